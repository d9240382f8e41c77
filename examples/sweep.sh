#!/usr/bin/env bash
# Two runs side by side from the command line, and one page about both.
# One sees a table for each run, and where the page lies. Started again, it repeats nothing that is done.
set -e
lightning-prune --multirun experiment=smoke hydra/launcher=parallel hydra.sweep.dir=sweep dense_twin=false threads=1 \
  trainer.max_epochs=4 trainer.limit_train_batches=1.0 trainer.limit_test_batches=1.0 method.pruning_ratio=0.4,0.7
lightning-prune report sweep
