"""Test doubles and harnesses: fake engine, in-process server, link emulator, virtual time."""
