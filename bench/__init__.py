"""Is every case right, and how fast is it against every alternative?

    python -m bench contact | run | gpu | cache | tune | report | status

The way of one case through the files:

    cases.py      what: a case, and the grids of cases
    problem.py    a case with its weights, and one way to compute it
    systems.py    who: one adapter for each system
    measure.py    values, then times, on a device of devices.py, over the floor of floor.py
    results.py    rows in a JSON file
    machine.py    what a results file says of a machine
    report.py     tables; pictures.py draws

Around this way:

    commands   run.py drives pytest-benchmark (test_bench.py, conftest.py). gpu.py measures everything within a budget.
    children   worker.py measures in a child process. watchdog.py ends a child that hangs. journal.py notes the tests.
    plans      plans.py asks the planner about a case. tune.py measures plans. routes.py finds where nn.LSTM is faster.
    contact    contact.py tries a new GPU. contact_cases.py has the layers, contact_worker.py checks them, and
               contact_report.py puts what was found into words. hang.py finds what a kernel waits for. handoff.py times
               a value on its way from one multiprocessor to another.
    no GPU     resources.py and sass.py read what the kernels compile to. digest.py tells whether that has changed.
               overhead.py counts what a call costs the host; calls.py has these calls. cache.py and pretend.py compile
               for a GPU that is elsewhere. pool.py has processes that compile. hits.py counts what was compiled.
"""
