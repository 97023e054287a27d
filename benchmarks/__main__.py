"""Runs every benchmark: `python -m benchmarks`."""

from benchmarks import demo, objectives, phantom

phantom.main()
demo.main()
objectives.main()
