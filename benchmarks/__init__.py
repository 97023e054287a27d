"""What the numbers of README and docs come from; each module prints one table."""
