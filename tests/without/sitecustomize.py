"""On PYTHONPATH: the modules that MGPP_WITHOUT names are not installed, in every process."""

import os
import sys

sys.modules.update(dict.fromkeys(os.environ["MGPP_WITHOUT"].split()))  # None: it cannot be found
