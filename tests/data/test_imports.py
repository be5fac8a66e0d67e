import subprocess
import sys


def test_reading_data_needs_neither_onnx_nor_pillow_until_a_picture_is_read():
    heavy = ("onnx", "onnx_ir", "onnxruntime", "PIL")
    code = f"import sys, quantkit.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
