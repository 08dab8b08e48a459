"""Tests, mirrored on the packages they test."""

from launch.garbage import collect_rarely

collect_rarely()  # before torch and all else that tests and their ranks import
