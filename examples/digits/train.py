"""Train the shipped digit classifier and write everything that this folder holds.

    pip install torch==2.13.0 scikit-learn onnx onnxruntime pillow
    python examples/digits/train.py

writes beside this file, the same bytes each time on the same machine and versions:

    model.onnx   float32, opset 20; input "input" [batch, 1, 8, 8] in 0…1, output "logits" [batch, 10]
    calib/       256 of the training images, 8-bit gray PNG
    eval.npz     the images that training never saw: images uint8 [597, 1, 8, 8], labels uint8 [597]

PyTorch is needed here only: quantkit does not depend on it, and the demo runs on the files as they are. The
ONNX graph is written node by node, so that BatchNormalization stays in it for quantkit to fold.
"""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
SEED = 20
EVAL_IMAGES = 597
CALIB_IMAGES = 256
EPOCHS = 60
BATCH = 64


class ConvBN(nn.Module):
    """A convolution without bias, padded to keep the size, and its BatchNorm."""

    def __init__(self, inputs: int, outputs: int, size: int, *, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] → [N, outputs, H, W]."""
        return self.bn(self.conv(x))


class DigitNet(nn.Module):
    """A residual block, a depthwise bottleneck, pooling and a linear layer: 64 k weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(1, 32, 3)
        self.block1 = ConvBN(32, 32, 3)
        self.block2 = ConvBN(32, 32, 3)
        self.expand = ConvBN(32, 64, 1)
        self.depthwise = ConvBN(64, 64, 3, groups=64)
        self.project = ConvBN(64, 64, 1)
        self.head = ConvBN(64, 64, 3)
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 1, 8, 8] in 0…1 → logits [N, 10]."""
        x = functional.relu(self.stem(x))
        x = functional.relu(self.block2(functional.relu(self.block1(x))) + x)
        x = functional.relu6(self.depthwise(functional.relu6(self.expand(x))))
        x = functional.max_pool2d(self.project(x), 2)
        x = functional.relu(self.head(x))
        return self.classifier(x.mean((2, 3)))


class GraphWriter:
    """Collects nodes and weights of an ONNX graph; every method returns the name of what it made."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, value: torch.Tensor) -> str:
        """Store `value` as the initializer `name`."""
        self.weights.append(numpy_helper.from_array(value.detach().numpy(), name))
        return name

    def node(self, op_type: str, inputs: list[str], output: str, **attributes: object) -> str:
        """Append a node with one output."""
        self.nodes.append(
            helper.make_node(op_type, inputs, [output], name=f"/{output}/{op_type}", **attributes)
        )
        return output

    def conv_bn(self, name: str, x: str, layer: ConvBN) -> str:
        """Append Conv and BatchNormalization."""
        conv, bn = layer.conv, layer.bn
        weight = self.weight(f"{name}.conv.weight", conv.weight)
        pad = conv.padding[0]
        y = self.node("Conv", [x, weight], f"{name}.conv", group=conv.groups, pads=[pad] * 4, strides=[1, 1])
        named = {"weight": bn.weight, "bias": bn.bias, "mean": bn.running_mean, "var": bn.running_var}
        norms = [self.weight(f"{name}.bn.{key}", value) for key, value in named.items()]
        return self.node("BatchNormalization", [y, *norms], f"{name}.bn", epsilon=bn.eps)


def to_onnx(net: DigitNet) -> onnx.ModelProto:
    """Write `net` as DigitNet.forward runs it."""
    g = GraphWriter()
    six = [g.weight("zero", torch.tensor(0.0)), g.weight("six", torch.tensor(6.0))]
    stem = g.node("Relu", [g.conv_bn("stem", "input", net.stem)], "stem")
    x = g.node("Relu", [g.conv_bn("block1", stem, net.block1)], "block1")
    x = g.node("Add", [g.conv_bn("block2", x, net.block2), stem], "block2.sum")
    x = g.node("Relu", [x], "block2")
    x = g.node("Clip", [g.conv_bn("expand", x, net.expand), *six], "expand")
    x = g.node("Clip", [g.conv_bn("depthwise", x, net.depthwise), *six], "depthwise")
    x = g.conv_bn("project", x, net.project)
    x = g.node("MaxPool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
    x = g.node("Relu", [g.conv_bn("head", x, net.head)], "head")
    x = g.node("GlobalAveragePool", [x], "mean")
    x = g.node("Flatten", [x], "features")
    linear = [g.weight(f"classifier.{n}", p) for n, p in net.classifier.named_parameters()]
    g.node("Gemm", [x, *linear], "logits", transB=1)
    graph = helper.make_graph(
        g.nodes,
        "digits",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        g.weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return training images, evaluation images (uint8 [N, 1, 8, 8]), and the labels of both (uint8 [N])."""
    pixels, labels = load_digits(return_X_y=True)
    # The data counts 0 to 16; files of images count 0 to 255.
    images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    split = train_test_split(
        images, labels.astype(np.uint8), test_size=EVAL_IMAGES, random_state=SEED, stratify=labels
    )
    return tuple(split)


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the images, each moved by up to one pixel either way."""
    padded = functional.pad(images, (1, 1, 1, 1))
    moves = torch.randint(0, 3, (len(images), 2), generator=generator).tolist()
    return torch.stack([p[:, r : r + 8, c : c + 8] for p, (r, c) in zip(padded, moves, strict=True)])


def train(images: np.ndarray, labels: np.ndarray) -> DigitNet:
    """Train with Adam, a one-cycle learning rate, shifts and label smoothing; about a minute on two cores."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    # Sums in another number of threads round differently.
    torch.set_num_threads(1)
    draws = torch.Generator().manual_seed(SEED)
    x, y = torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()
    net = DigitNet()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=draws)
        for i in range(0, len(x) - BATCH + 1, BATCH):
            pick = order[i : i + BATCH]
            loss = functional.cross_entropy(net(shifted(x[pick], draws)), y[pick], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def main() -> None:
    train_images, eval_images, train_labels, eval_labels = load()
    net = train(train_images, train_labels)
    onnx.save(to_onnx(net), HERE / "model.onnx")

    (HERE / "calib").mkdir(exist_ok=True)
    for i, image in enumerate(train_images[:CALIB_IMAGES]):
        Image.fromarray(image[0]).save(HERE / "calib" / f"{i:03}.png", optimize=True)
    np.savez_compressed(HERE / "eval.npz", images=eval_images, labels=eval_labels)

    session = onnxruntime.InferenceSession(HERE / "model.onnx", providers=["CPUExecutionProvider"])
    x = eval_images.astype(np.float32) / 255
    logits = session.run(None, {"input": x})[0]
    with torch.no_grad():
        difference = np.abs(logits - net(torch.from_numpy(x)).numpy()).max()
    print(f"held-out accuracy {np.mean(logits.argmax(1) == eval_labels):.2%} of {len(eval_labels)} images")
    print(f"largest difference between PyTorch and ONNX Runtime {difference:.1e}")


if __name__ == "__main__":
    main()
