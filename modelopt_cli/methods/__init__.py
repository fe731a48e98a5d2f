"""Compression methods: each a config (what) and an ``apply`` (how)."""
