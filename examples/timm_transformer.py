"""A vision transformer of timm loses attention heads and the width of its MLPs.

One sees the heads of each block before and after. `heads="inside"` would leave all heads and make them narrower, and
`heads="keep"` would cut the MLPs only.
"""

from functools import partial

import lightning.pytorch as pl
import torch
from timm.models import VisionTransformer

from lightning_prune import history_of
from lightning_prune.callbacks import PruneCallback
from lightning_prune.criteria import Taylor
from lightning_prune.workbench import Classifier, Digits

vit = VisionTransformer(
    img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=2, num_heads=8, weight_init="jax"
)
dense = [(block.attn.num_heads, block.mlp.fc1.out_features) for block in vit.blocks]
model, digits = Classifier(vit, 10, optimizer=partial(torch.optim.AdamW, lr=4e-3)), Digits()

# The residual trunk reads the patches, so it stays as wide as it is where their embedding is not touched.
taylor = PruneCallback(0.5, of="macs", criterion=Taylor(), heads="whole", ignore=["net.patch_embed"], begin=4)
trainer = pl.Trainer(max_epochs=10, callbacks=[taylor], accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(model, digits)
trainer.test(model, digits)
print(history_of(model)[-1])
for place, (block, (heads, hidden)) in enumerate(zip(vit.blocks, dense, strict=True)):
    print(f"block {place}: heads {heads} -> {block.attn.num_heads}, MLP {hidden} -> {block.mlp.fc1.out_features}")
