"""TensorRT 11.0, whose plugin Python fails under NumPy 2.4. `test_tensorrt_plugin.py` starts this file."""

import numpy as np
import pytest

from causalrt.errors import ExecutorError
from causalrt.plugins.tensorrt_plugin import register_plugins
from support import library_double as library

pytestmark = pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.4.0", reason="needs NumPy >= 2.4")


def test_registration_is_refused(tmp_path):
    trt = library.imported()
    with pytest.raises(ExecutorError) as caught:
        register_plugins(trt, target=80, cache=tmp_path)
    message = str(caught.value)
    assert f"TensorRT {trt.__version__}" in message
    assert f"NumPy {np.__version__}" in message
    assert "'tensorrt-cu13>=11.2,<12'" in message


def test_a_plugin_with_a_number_cannot_be_made():
    trt, api = library.imported(), library.plugin_api()

    @api.register("causalrt::scaled")
    def scaled(x: api.TensorDesc, factor: int) -> api.TensorDesc:
        return x.like()

    creator = trt.get_plugin_registry().get_creator("scaled", "1", "causalrt")
    fields = trt.PluginFieldCollection([trt.PluginField("factor", np.array([5], np.int32), trt.PluginFieldType.INT32)])
    with pytest.raises(TypeError, match="only 0-dimensional arrays can be converted"):
        creator.create_plugin("scaled", "causalrt", fields, trt.TensorRTPhase.BUILD)
