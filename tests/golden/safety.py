"""A tiny detector with the interface of NudeNet's, what the package `nudenet` makes of it, and Q16's rule on a tiny CLIP."""

import importlib.util
import pickle
from hashlib import sha256

import numpy as np
import torch
from safetensors.torch import save_file

from common import CHECKPOINTS, ROOT, randn, save_case

FOLDER = ROOT / "safety"
#: Heights and widths: square, wide, high, tiny, an odd rest, the network's own size and twice it.
SIZES = [(64, 64), (50, 131), (333, 90), (3, 5), (512, 301), (320, 320), (213, 640), (640, 640), (77, 1001)]
Q16_SIZES = [(24, 24), (50, 33), (11, 40), (131, 90), (64, 64), (30, 30), (100, 70), (25, 25)]
VERSIONS = ["3.0.8", "3.4.2"]
#: The packages' own networks: their files, which are not part of this project, and the parts of `people.png`, a part of
#: demo/samples.png, in which they find something. Columns, rows, width and height.
NETWORKS = {"3.0.8": "best.onnx", "3.4.2": "320n.onnx"}
PARTS = [(0, 0, 512, 140), (0, 0, 250, 140), (3, 20, 501, 97), (259, 0, 121, 139), (0, 0, 251, 139), (131, 1, 379, 101)]


def network(channels=3, rows=22, second_input=False, second_output=False, nan=False):
    """An ONNX network of pictures [1, 3, 320, 320] to boxes and scores [1, 22, 100]: a convolution over cells of 32
    pixels, and sigmoids that are stretched to sizes of boxes and to scores of all magnitudes. The options make networks
    that are no detectors."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = randn("safety/weight", rows, channels, 8, 8) / 14
    weight[4:] *= 3
    bias = randn("safety/bias", rows) * 0.3
    bias[4:] -= 2.2
    if nan:
        bias[-1] = torch.nan
    # Centres reach beyond the picture, so that boxes are clipped.
    stretch = torch.ones(1, rows, 1)
    stretch[:, :2], stretch[:, 2:4] = 360, 220
    shift = torch.zeros(1, rows, 1)
    shift[:, :2] = -20
    constants = {"weight": weight, "bias": bias, "stretch": stretch, "shift": shift}
    initializers = [numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()]
    initializers.append(numpy_helper.from_array(np.array([1, rows, 100], dtype=np.int64), "shape"))
    nodes = [
        helper.make_node("Conv", ["images", "weight", "bias"], ["cells"], strides=[32, 32], kernel_shape=[8, 8]),
        helper.make_node("Reshape", ["cells", "shape"], ["rows"]),
        helper.make_node("Sigmoid", ["rows"], ["unit"]),
        helper.make_node("Mul", ["unit", "stretch"], ["stretched"]),
        helper.make_node("Add", ["stretched", "shift"], ["output0"]),
    ]
    tensor = lambda name, *shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))
    inputs, outputs = [tensor("images", 1, channels, 320, 320)], [tensor("output0", 1, rows, 100)]
    if second_input:
        nodes.append(helper.make_node("Add", ["output0", "more"], ["sum"]))
        inputs, outputs = inputs + [tensor("more", 1, rows, 100)], [tensor("sum", 1, rows, 100)]
    if second_output:
        outputs.append(tensor("unit", 1, rows, 100))
    graph = helper.make_graph(nodes, "detector", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


#: Networks with other inputs, outputs or numbers than a detector's.
OTHERS = {
    "channels": {"channels": 1}, "inputs": {"second_input": True}, "outputs": {"second_output": True},
    "rows": {"rows": 21}, "nan": {"nan": True},
}


def package(version):
    """The module `nudenet.nudenet` of that version, from a folder beside this file or the one that NUDENET names: two
    versions cannot be installed at once."""
    import os

    folder = os.environ.get("NUDENET", str(ROOT / "nudenet"))
    path = f"{folder}/{version}/nudenet/nudenet.py"
    spec = importlib.util.spec_from_file_location("nudenet_" + version.replace(".", "_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def detector(version, file):
    """The package's detector with another network."""
    import onnxruntime

    module = package(version)
    made = module.NudeDetector.__new__(module.NudeDetector)
    made.onnx_session = onnxruntime.InferenceSession(str(file))
    made.input_width = made.input_height = 320
    made.input_name = "images"
    return module, made


def picture(height, width, k):
    """A picture by a formula, which the test repeats: stripes, and squares that differ in size."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return ((((x * (k + 3) + y * (2 * k + 5)) >> 1) ^ (x * y >> 5)) + 85 * c & 255).astype(np.uint8)


def record(args):
    import cv2
    import tempfile

    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / "detector.onnx"
    file.write_bytes(network())
    for name, options in OTHERS.items():
        (FOLDER / f"{name}.onnx").write_bytes(network(**options))
    tensors, found, inputs = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for index, (height, width) in enumerate(SIZES):
            pixels = picture(height, width, index)
            path = f"{folder}/{index}.png"
            cv2.imwrite(path, pixels[:, :, ::-1])
            for version in VERSIONS:
                module, made = detector(version, file)
                blob, *_ = module._read_image(path, 320)
                # Bytes, since the package resizes before it divides by 255.
                inputs.setdefault(version, []).append(sha256(np.rint(blob[0] * 255).astype(np.uint8).tobytes()).hexdigest())
                detections = made.detect(path)
                raw = made.onnx_session.run(None, {"images": blob})[0]
                tensors[f"out.{version}.raw.{index}"] = torch.from_numpy(raw[0])
                found.setdefault(version, []).append(
                    [[d["class"], d["score"], [int(x) for x in d["box"]]] for d in detections])
    real = record_networks()
    counts = {version: [len(one) for one in lists] for version, lists in found.items()}
    print(counts)
    assert all(sum(count) > 40 for count in counts.values()), "too few detections to tell anything"
    save_case("safety_detector", tensors, {"sizes": SIZES, "inputs": inputs, "detections": found,
                                            "parts": PARTS, "real": real})
    record_q16()


def record_networks():
    """What the packages' own networks find in the parts of people.png."""
    import cv2
    import os
    import tempfile

    folder = os.environ.get("NUDENET", str(ROOT / "nudenet"))
    people = cv2.imread(str(FOLDER / "people.png"))
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for version, name in NETWORKS.items():
            _, made = detector(version, f"{folder}/{version}/nudenet/{name}")
            for x, y, w, h in PARTS:
                path = f"{scratch}/part.png"
                cv2.imwrite(path, people[y:y + h, x:x + w])
                found.setdefault(version, []).append(
                    [[d["class"], d["score"], [int(x) for x in d["box"]]] for d in made.detect(path)])
    print(found)
    return found


@torch.no_grad()
def record_q16():
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPModel

    folder = CHECKPOINTS / "clip"
    model = CLIPModel.from_pretrained(folder).float().eval()
    processor = CLIPImageProcessor.from_pretrained(folder)
    tensors = {}
    embeds = []
    for index, (height, width) in enumerate(Q16_SIZES):
        pixels = picture(height, width, index)
        values = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
        embeds.append(model.get_image_features(pixel_values=values)[0])
    embeds = torch.stack(embeds)
    # The mean of all, moved a little to either side: of random vectors one would be nearest to all pictures.
    side = randn("q16/side", embeds.shape[1]) * embeds.std() * 0.5
    vectors = (torch.stack([embeds.mean(0) + side, embeds.mean(0) - side]) * 3).numpy()
    unit = torch.from_numpy(vectors) / torch.from_numpy(vectors).norm(dim=-1, keepdim=True)
    logits = 100 * (embeds / embeds.norm(dim=-1, keepdim=True)) @ unit.T
    tensors["out.probabilities"] = logits.softmax(-1)
    print("Q16:", tensors["out.probabilities"][:, 1].tolist())
    assert 0 < (logits[:, 1] > logits[:, 0]).sum() < len(logits), "all pictures are of one kind"
    save_case("safety_q16", tensors, {"sizes": Q16_SIZES})
    save_file({"prompts": torch.from_numpy(vectors)}, FOLDER / "q16.safetensors")
    for protocol in (3, 4, 5):
        (FOLDER / f"q16-{protocol}.p").write_bytes(pickle.dumps(vectors, protocol=protocol))
    # Of numpy 1, column-major, and in fp64: the same numbers.
    old = pickle.dumps(vectors, protocol=3).replace(b"numpy._core", b"numpy.core")
    (FOLDER / "q16-numpy1.p").write_bytes(old)
    (FOLDER / "q16-fortran.p").write_bytes(pickle.dumps(np.asfortranarray(vectors), protocol=4))
    (FOLDER / "q16-double.p").write_bytes(pickle.dumps(vectors.astype(np.float64), protocol=4))
    # These must be refused: a call, a tensor, integers, several arrays.
    (FOLDER / "refused-call.p").write_bytes(pickle.dumps(Malicious(), protocol=4))
    (FOLDER / "refused-tensor.p").write_bytes(pickle.dumps(torch.from_numpy(vectors), protocol=4))
    (FOLDER / "refused-integers.p").write_bytes(pickle.dumps(vectors.astype(np.int64), protocol=4))
    (FOLDER / "refused-list.p").write_bytes(pickle.dumps([vectors, vectors], protocol=4))
    (FOLDER / "refused-objects.p").write_bytes(pickle.dumps(np.array([[1, None]], dtype=object), protocol=4))


class Malicious:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/respodiff-was-tricked",)
