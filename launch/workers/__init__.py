"""The worker processes of a run on Ray, and the actor that holds their status."""

from launch.garbage import collect_rarely

collect_rarely()  # what Ray imports first of ours in each of its processes lies here
