"""Every setting once, as frozen dataclasses."""
