"""Runs every benchmark: `python -m benchmarks`."""

from benchmarks import demo, phantom

phantom.main()
demo.main()
