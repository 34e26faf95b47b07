"""The whole line in one go, on this machine: profile, trace, fit, plan, serve, answer, compare.

It strings the other rooms together and adds nothing of its own: whatever it does, the single commands
do too.
"""

from wispprof.demo.demo_run import DemoResult, run_demo
from wispprof.demo.demo_settings import DemoSettings

__all__ = ["DemoResult", "DemoSettings", "run_demo"]
