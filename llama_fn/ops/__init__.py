"""Linear maps and attention, computed fast: tables of kernels below the definitions in `model/`."""
