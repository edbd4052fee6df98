"""Decoding behind a key-value cache of fixed size: the same kernels at the same addresses for every token, so that on a GPU one
CUDA graph replays them without Python and without launching each by itself.

Legend: B sequences, S positions, V vocabulary.
"""

import torch
from transformers import StaticCache


def rolls_on(cache) -> bool:
    """Whether a layer keeps a window of the past or, as linear attention does, a running state only."""
    return any(getattr(layer, "is_sliding", True) for layer in cache.layers)


class StaticDecoding:
    """Feeds `ids[:, num_prompt:]` token by token, as often as wanted. ids: `[B, S]` on the model's device.

    Raises ValueError for a model whose layers keep a window of the past or a running state only: their static caches roll on.
    """

    def __init__(self, model, ids_BS: torch.Tensor, num_prompt: int):
        self.model, self.ids_BS, self.num_prompt = model, ids_BS, num_prompt
        self.graph: torch.cuda.CUDAGraph | None = None
        self.cache = StaticCache(config=model.config, max_cache_len=ids_BS.shape[1])
        if rolls_on(self.cache):
            raise ValueError("layers with a sliding window or linear attention have no cache that could be set back")
        with torch.inference_mode():
            model(input_ids=ids_BS[:, :num_prompt], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.token_B1 = ids_BS[:, num_prompt : num_prompt + 1].clone()

    def restart(self) -> None:
        """Back behind the prompt: what lies there beyond it is masked, and written anew."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.num_prompt)

    def step(self) -> None:
        self.logits_B1V = self.model(input_ids=self.token_B1, past_key_values=self.cache, use_cache=True).logits

    @torch.inference_mode()
    def capture(self) -> None:
        """On a GPU: one step as a CUDA graph. Raises RuntimeError where something in it cannot be captured, such as a decision
        that Python takes on a value."""
        with torch.cuda.device(self.ids_BS.device):  # graphs are captured on the current one
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # lets every kernel choose and allocate what it needs
                for _ in range(3):
                    self.restart()
                    self.step()
            torch.cuda.current_stream().wait_stream(side)
            self.restart()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
        self.graph = graph

    @torch.inference_mode()
    def run(self, keep: bool = False) -> list[torch.Tensor]:
        """Every token from the prompt on, by the graph where there is one; the logits `[B, 1, V]` of each if asked to `keep`
        them."""
        self.restart()
        found = []
        for place in range(self.num_prompt, self.ids_BS.shape[1]):
            self.token_B1.copy_(self.ids_BS[:, place : place + 1])
            if self.graph is None:
                self.step()
            else:
                self.graph.replay()
            if keep:
                found.append(self.logits_B1V.clone())
        return found
