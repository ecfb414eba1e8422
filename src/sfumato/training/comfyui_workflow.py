"""The nearest workflow of ComfyUI to an image's request, as the text that it reads when the file is dropped on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from sfumato.sampling.request import ImageRequest

_SAMPLERS = {  # sd-scripts' names -> ComfyUI's, where it has the same one
    "ddim": "ddim", "pndm": "euler", "lms": "lms", "euler": "euler", "euler_a": "euler_ancestral", "heun": "heun",
    "dpm_2": "dpm_2", "dpm_2_a": "dpm_2_ancestral", "dpmsolver": "dpmpp_2m", "dpmsolver++": "dpmpp_2m",
    "dpmsingle": "dpmpp_2s_ancestral",
}  # fmt: skip
COLUMN, ROW = 400, 220  # pixels between nodes on its canvas


class WorkflowGraph:
    """Nodes and the links between them, in the form that ComfyUI saves."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []

    def add(
        self, kind: str, values: Sequence[Any], outputs: Sequence[str], inputs: Sequence[tuple[str, str, int, int]] = ()
    ) -> int:
        """A node and its number. inputs: name, type, and number and output of the node that it comes from."""
        number = len(self.nodes) + 1
        sockets = [self._link(number, slot, each) for slot, each in enumerate(inputs)]
        self.nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": [COLUMN * ((number - 1) // 3), ROW * ((number - 1) % 3)],
                "size": [COLUMN - 60, ROW - 60],
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": sockets,
                "outputs": [
                    {"name": name, "type": name, "links": [], "slot_index": i} for i, name in enumerate(outputs)
                ],
                "properties": {},
                "widgets_values": list(values),
            }
        )
        return number

    def _link(self, target: int, slot: int, given: tuple[str, str, int, int]) -> dict[str, Any]:
        name, kind, source, output = given
        link = len(self.links) + 1
        self.links.append([link, source, output, target, slot, kind])
        self.nodes[source - 1]["outputs"][output]["links"].append(link)
        return {"name": name, "type": kind, "link": link}

    def write(self) -> str:
        """Its JSON."""
        return json.dumps(
            {
                "last_node_id": len(self.nodes),
                "last_link_id": len(self.links),
                "nodes": self.nodes,
                "links": self.links,
                "groups": [],
                "config": {},
                "extra": {},
                "version": 0.4,
            }
        )


def make_workflow(
    request: ImageRequest, *, checkpoint: str, adapters: Sequence[tuple[str, float]] = (), channels: int = 4
) -> str:
    """Checkpoint, adapters, both prompts, sampler and decoding; what else the request has is not in it.

    channels: of the latents. Files are named as in ComfyUI's own folders: without theirs.
    """
    graph = WorkflowGraph()
    loader = graph.add("CheckpointLoaderSimple", [PurePath(checkpoint).name], ("MODEL", "CLIP", "VAE"))
    model, clip = (loader, 0), (loader, 1)
    for path, strength in adapters:
        inputs = [("model", "MODEL", *model), ("clip", "CLIP", *clip)]
        added = graph.add("LoraLoader", [PurePath(path).name, strength, strength], ("MODEL", "CLIP"), inputs)
        model, clip = (added, 0), (added, 1)
    texts = [
        graph.add("CLIPTextEncode", [text], ("CONDITIONING",), [("clip", "CLIP", *clip)])
        for text in (request.prompt, request.negative_prompt)
    ]
    latents = "EmptyLatentImage" if channels == 4 else "EmptySD3LatentImage"
    empty = graph.add(latents, [request.width, request.height, 1], ("LATENT",))
    sampler = _SAMPLERS.get(request.sampler.removeprefix("k_"), "euler")
    strength = request.start.strength if request.start is not None else 1.0
    sampled = graph.add(
        "KSampler",
        [request.seed, "fixed", request.steps, request.scale, sampler, "normal", strength],
        ("LATENT",),
        [
            ("model", "MODEL", *model),
            ("positive", "CONDITIONING", texts[0], 0),
            ("negative", "CONDITIONING", texts[1], 0),
            ("latent_image", "LATENT", empty, 0),
        ],
    )
    decoded = graph.add("VAEDecode", [], ("IMAGE",), [("samples", "LATENT", sampled, 0), ("vae", "VAE", loader, 2)])
    graph.add("SaveImage", ["sfumato"], (), [("images", "IMAGE", decoded, 0)])
    return graph.write()
