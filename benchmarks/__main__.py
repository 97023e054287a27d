"""Runs every benchmark: `python -m benchmarks`."""

from benchmarks import demo, feed, loop, loss_scaling, objectives, phantom, plan_table, weights

phantom.main()
weights.main()
feed.main()
demo.main()
objectives.main()
loop.main()
loss_scaling.main()
plan_table.main()
