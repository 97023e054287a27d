"""What a run will need on accelerators that are not here; `planner.plan.plan` makes a plan."""
