"""On PYTHONPATH: torch as on a machine with one GPU, in every process, as soon as it is imported."""

import importlib.abc
import importlib.machinery
import sys


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch.cuda":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            module.is_available = lambda: True
            module.device_count = lambda: 1

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder())
