"""Is every case right, and how fast is it against every alternative?

    python -m bench contact | run | gpu | cache | tune | report | status

The way of one case through the files: cases.py (what) -> systems.py (who) -> measure.py (values, then times, on a
device of devices.py) -> results.py (rows in a JSON file) -> report.py (tables) and pictures.py. test_bench.py puts it
on pytest-benchmark, which run.py drives; gpu.py runs all of it within a budget, in child processes (worker.py) under a
watchdog (watchdog.py). plans.py asks the planner about a case, tune.py measures plans; resources.py and sass.py tell
what the kernels compile to, digest.py whether that has changed, overhead.py what a call costs beside them. contact.py
is for a GPU that nobody has tried yet: contact_worker.py checks layers, hang.py finds what a kernel that does not end
waits for, handoff.py times a value on its way, contact_report.py has the words. cache.py compiles for a GPU that is
elsewhere, where hits.py tells what that was worth.
"""
