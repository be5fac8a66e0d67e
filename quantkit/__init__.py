"""quantkit: post-training quantization and calibration for ONNX models on NVIDIA GPUs."""

__version__ = "0.1.0"
