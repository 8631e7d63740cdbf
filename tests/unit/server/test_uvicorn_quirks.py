"""The overrides of uvicorn's internals are written for the version that is installed."""

import hashlib
import inspect

import pytest
import uvicorn

from causalrt.server.uvicorn_quirks import SOURCE_DIGESTS


@pytest.mark.parametrize("overridden", SOURCE_DIGESTS, ids=lambda overridden: overridden.__name__)
def test_overridden_classes_are_those_that_the_overrides_were_written_for(overridden):
    digest = hashlib.sha256(inspect.getsource(overridden).encode()).hexdigest()
    assert digest == SOURCE_DIGESTS[overridden], (
        f"{overridden.__name__} of uvicorn {uvicorn.__version__} differs from the one that server/uvicorn_quirks.py overrides: "
        "read what changed, check every override, then update SOURCE_DIGESTS"
    )
