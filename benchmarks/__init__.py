"""Side-by-side measurements, always as ratios within one run."""
