"""Which integration tests run: FASTLOSS_TEST_SLOW=1 adds every model class and the real trainers' longer runs."""

import os

import pytest

SLOW = os.environ.get("FASTLOSS_TEST_SLOW") == "1"
slow = pytest.mark.skipif(not SLOW, reason="FASTLOSS_TEST_SLOW=1 runs it")
