"""Attention flow of any matrices, with the published arguments."""

from collections.abc import Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from pyglobenc.compat.globenc.attention_flow_abstract import AttentionFlow
from pyglobenc.methods.rollout.flow import attention_flow


class AttentionMaxFlow(AttentionFlow):
    """Maximum flow from every token of a layer down to every input token (Abnar and Zuidema, 2020)."""

    def compute_flows(
        self,
        attentions_list: Sequence[np.ndarray],
        desc: str = "",
        output_hidden_states: bool = False,
        num_cpus: int = 4,
    ) -> list[np.ndarray]:
        """Compute the flow of each example, with rows that sum to 1.

        The published code needs models of 12 layers; here any number of layers is accepted.

        Args:
            attentions_list: one array (L, n, n) for each example, first layer first.
            desc: text shown beside the progress bar.
            output_hidden_states: return the flow from every layer; otherwise only from the last one.
            num_cpus: ignored, because one process computes everything.

        Returns:
            One float64 array for each example: (L, n, n), or (1, n, n) of the last layer.
        """
        return [
            _flow(np.asarray(self.pre_process(matrices)), output_hidden_states)
            for matrices in tqdm(attentions_list, desc=desc)
        ]


def _flow(matrices: np.ndarray, layers: bool) -> np.ndarray:
    capacities = torch.from_numpy(matrices.astype(np.float64))[None]
    every = torch.arange(matrices.shape[1], device=capacities.device)[None]
    return attention_flow(capacities, every, None, layers)[0].numpy()
