"""The quickstart: probe, blueprint, select and train once, on real text, against control arms.

Started by ``fastgrad quickstart``; :func:`fastgrad.quickstart.run.run_quickstart` is the entry.
Each arm of the comparison runs in a process of its own (:mod:`fastgrad.quickstart.worker`).
"""
