"""For all rooms: property tests answer right or wrong, never slow, so a busy machine cannot fail them."""

from hypothesis import settings

settings.register_profile("wispprof", deadline=None)
settings.load_profile("wispprof")
