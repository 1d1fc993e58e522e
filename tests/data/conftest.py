"""Property tests here are never timed: on a busy machine a deadline fails what is right."""

from hypothesis import settings

settings.register_profile("objectives", deadline=None)
settings.load_profile("objectives")
