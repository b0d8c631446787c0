"""Benchmarks of the fused operators. Run them from a checkout: `python -m bench --help`.

harness/          what every benchmark uses: cases, timing, memory, environment, the run, the report
operators.py      the benchmarks by name; each operator has a file of its name beside it
rollout.py, rollout_schedule.py, train_step.py    benchmarks of whole parts of the training
plot.py, compare.py                 figures of results; regressions between two results
scaling.py, planner.py, routes.py   measurements behind docs/scaling.md and the table of routes
gpu_report.py, before_after.py      everything that a short slot on a machine should measure
results/          results that the documents quote
"""
