"""Channels of a network that depend on one another, and their removal."""

from modelopt_cli.program.channels.dependencies import Dependencies, Group, Member, analyse, layered
from modelopt_cli.program.channels.removal import remove

__all__ = ["Dependencies", "Group", "Member", "analyse", "layered", "remove"]
