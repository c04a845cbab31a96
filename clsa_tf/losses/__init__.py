"""The objectives, as pure functions: embeddings in, one value per row out.

* `contrast`: telling one key from other candidates: `cosines`, `info_nce`,
  `nt_xent`.
* `divergence`: one distribution over the candidates teaches another: `ddm`,
  `teacher_entropy`.
* `prediction`: predicting an embedding, with nothing to tell it from:
  `regression`.
* `cacr`: hard negatives repel more, hard positives attract more:
  `cacr_attraction`, `cacr_repulsion`, `cacr_rbf`, `cacr_euclidean`.

`N` rows per replica, `G` of the global batch, `C` candidates (keys of the batch
and of the queue). Inputs are unit rows or their similarities, cosines in
[-1, 1]; every function divides by its own temperature. Nothing here averages
over rows, divides by the number of replicas or holds state: that is
`Method.train_step`'s business. Everything is computed in at least float32
(float16 would underflow: a typical probability over 65,536 keys is 1e-5 to
1e-9).
"""

from clsa_tf.losses.cacr import (
    cacr_attraction,
    cacr_euclidean,
    cacr_rbf,
    cacr_repulsion,
)
from clsa_tf.losses.contrast import cosines, info_nce, nt_xent
from clsa_tf.losses.divergence import ddm, teacher_entropy
from clsa_tf.losses.prediction import regression

__all__ = [
    "cacr_attraction",
    "cacr_euclidean",
    "cacr_rbf",
    "cacr_repulsion",
    "cosines",
    "ddm",
    "info_nce",
    "nt_xent",
    "regression",
    "teacher_entropy",
]
