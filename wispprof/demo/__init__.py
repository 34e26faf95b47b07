"""The whole pipeline on this machine: profile, trace, fit, plan, serve, answer, compare.

It only calls what the single commands call too.
"""

from wispprof.demo.demo_run import DemoResult, run_demo
from wispprof.demo.demo_settings import DemoSettings

__all__ = ["DemoResult", "DemoSettings", "run_demo"]
