"""What tests of the compiled CPU kernels need."""

import pytest

from defensivekv.kernels.native import find_library

needs_library = pytest.mark.skipif(find_library().functions is None, reason=find_library().reason)
