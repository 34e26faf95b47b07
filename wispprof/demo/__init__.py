"""The whole pipeline on this machine: profile, trace, fit, plan, serve, answer, compare."""

from wispprof.demo.demo_run import DemoResult, run_demo
from wispprof.demo.measure_machine import DemoSettings

__all__ = ["DemoResult", "DemoSettings", "run_demo"]
