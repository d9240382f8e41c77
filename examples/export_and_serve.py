"""Prune, write the network as ONNX, and run the file without PyTorch.

One sees that the file says what the network says, with any number of images, and what the cut saves where the network
will run.
"""

from functools import partial
from time import perf_counter

import lightning.pytorch as pl
import onnxruntime
import torch

from lightning_prune import history_of
from lightning_prune.callbacks import MagnitudePruneCallback
from lightning_prune.exporting import export
from lightning_prune.workbench import VGG11BN, Classifier, Digits

sgd = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
digits, net = Digits(), VGG11BN(in_channels=1, image_size=8, width=0.5)
model = Classifier(net, 10, optimizer=sgd, example=torch.rand(2, 1, 8, 8))
print(export(model, "dense.onnx"))  # format="torch_export" and "torchscript" write for PyTorch itself

pruning = MagnitudePruneCallback(0.6, begin=0, end=4)
trainer = pl.Trainer(max_epochs=7, callbacks=[pruning], accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(model, digits)
print(history_of(model)[-1])
print(export(model, "pruned.onnx"))


def served(path: str) -> onnxruntime.InferenceSession:
    """Open a file, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


right = 0
for images, labels in digits.test_dataloader():
    session = served("pruned.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    right += int((logits.argmax(1) == labels.numpy()).sum())
print(f"accuracy of the file: {right / 360:.1%}")

image = torch.rand(1, 1, 8, 8).numpy()
for path in ("dense.onnx", "pruned.onnx"):
    session = served(path)
    start = perf_counter()
    for _ in range(200):
        session.run(None, {session.get_inputs()[0].name: image})
    print(f"{path}: {(perf_counter() - start) * 5:.2f} ms an image")
