"""One list of cases in, one list of results out, as JSON; see `benchmarks.shapes.measure`."""

import ctypes
import json
import sys

from benchmarks.shapes import library

ctypes.CDLL(str(library()), ctypes.RTLD_GLOBAL)  # before torch

from benchmarks.shapes.claimed import run  # noqa: E402

print(json.dumps([run(**case) for case in json.loads(sys.argv[1])]))
