"""MMEB's data sets as mteb tasks and our checkpoints as mteb models: `pip install "cocoa-embed[mteb]"`.

    import mteb
    from cocoa.mteb_tasks import mmeb_tasks, model_meta

    results = mteb.evaluate(model_meta("runs/cocoa/final"), mmeb_tasks("/data/MMEB-eval"), cache=None)

Any model that mteb runs is scored on them with the numbers of `cocoa evaluate`, and a checkpoint of ours runs on
any other image and text task of mteb.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from PIL import Image as PIL
from safetensors import safe_open
from transformers import AutoConfig

from cocoa.architectures import locate
from cocoa.bad_rows import BadRows
from cocoa.catalogue import find_dataset, scored_name
from cocoa.checkpoint import read_record, trained_length
from cocoa.embedding import load_embedder
from cocoa.embedding_cache import hash_folder
from cocoa.errors import CocoaError
from cocoa.eval_inputs import distinct_inputs, with_images_present, with_images_readable
from cocoa.evaluation import data_hash
from cocoa.image_files import split_archive
from cocoa.images import load_image, orientation, read_image_bytes
from cocoa.mmeb_eval import EvalDataset, read_eval
from cocoa.pairs import Side
from cocoa.scores import short_name


def mmeb_tasks(
    folder: str | Path,
    subsets: str | Sequence[str] = "all",
    split: str = "test",
    image_root: str | Path | None = None,
    on_bad_row: str = "error",
) -> list[MMEBTask]:
    """A task for each data set of a folder in MMEB-eval's layout, one's own included; arguments as of `evaluate`.

    Raises:
        CocoaError: a mistake in the data.
    """
    bad = BadRows(on_bad_row)
    found = with_images_present(read_eval(folder, subsets, split, image_root, bad), image_root or folder, bad)
    found, digests = with_images_readable(found, bad)
    found, inputs = distinct_inputs(found, digests)
    return [
        _task(dataset, split, str(folder), data_hash(dataset, [inputs.keys[i] for i in place]))
        for dataset, place in zip(found, inputs.places, strict=True)
    ]


def task_name(dataset: str) -> str:
    """What the task of a data set is called, in whichever spelling."""
    return f"MMEB-{scored_name(dataset)}"


class MMEBTask(AbsTaskRetrieval):
    """One data set of MMEB: each query among its own candidates, the right one last among equals.

    The main score, `hit_at_1`, is hit@1 of `cocoa evaluate` as a fraction. Instruction and text stand together in
    `text`, as every model of MMEB is asked.

    Attributes:
        found: who is compared with whom.
        split: the split's name.
        documents: (candidates,) indices into the inputs.
    """

    found: EvalDataset
    split: str
    documents: np.ndarray

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._top_k = max(map(len, self.found.candidates))

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Put the data set into mteb's form; images stay files."""
        if self.data_loaded:
            return
        found = self.found
        names = [f"query-{found.number(row)}" for row in range(len(found.queries))]
        data = RetrievalSplitData(
            queries=self._table(names, found.queries),
            corpus=self._table([f"candidate-{i}" for i in self.documents], self.documents),
            relevant_docs={name: {f"candidate-{ids[0]}": 1} for name, ids in zip(names, found.candidates, strict=True)},
            top_ranked={
                name: [f"candidate-{i}" for i in dict.fromkeys(ids.tolist())]
                for name, ids in zip(names, found.candidates, strict=True)
            },
        )
        self.dataset = {"default": {self.split: data}}
        self.data_loaded = True

    def task_specific_scores(
        self,
        scores: dict[str, dict[str, float]],
        qrels: Mapping[str, Mapping[str, int]],
        results: dict[str, dict[str, float]],
        hf_split: str,
        hf_subset: str,
    ) -> dict[str, float]:
        """hit@1 with ties against the model, as `cocoa.metrics.rank` counts."""
        hits = []
        for name, (right,) in ((name, tuple(documents)) for name, documents in qrels.items()):
            own = results[name][right]
            hits.append(all(score < own for document, score in results[name].items() if document != right))
        return {"hit_at_1": float(np.mean(hits))}

    def _table(self, names: list[str], ids: np.ndarray) -> Dataset:
        """Inputs as mteb reads them."""
        sides = [self.found.inputs[i] for i in ids.tolist()]
        columns: dict[str, list[Any]] = {}
        features: dict[str, Any] = {}
        if sides[0].image is not None:  # first: the order of columns becomes that of a model's prompt
            columns["image"] = [_image_cell(str(side.image)) for side in sides]
            features["image"] = Image()
        columns |= {"id": names, "text": [side.prompt() for side in sides]}
        features |= {"id": Value("string"), "text": Value("string")}
        return Dataset.from_dict(columns, features=Features(features))


def _task(dataset: EvalDataset, split: str, folder: str, revision: str) -> MMEBTask:
    """The task of a data set; a class of its own, since mteb takes the metadata of a task from its class.

    The revision is the hash of the data. mteb's cache of results does not look at it: where data may change, run
    with `cache=None` or `overwrite_strategy="always"`.
    """
    documents = np.unique(np.concatenate(dataset.candidates))
    category = f"{_kind(dataset, dataset.queries, 'queries')}2{_kind(dataset, documents, 'candidates')}"
    entry = find_dataset(dataset.name)
    metadata = TaskMetadata(
        name=task_name(dataset.name),
        description=f"MMEB-V1: {dataset.name}, {entry.meta_task if entry else 'own data'}",
        reference="https://huggingface.co/datasets/TIGER-Lab/MMEB-eval" if entry else None,
        dataset={"path": folder, "revision": revision},
        type="Any2AnyRetrieval",
        category=category,  # type: ignore[arg-type]  # one of mteb's list
        modalities=[kind for kind in ("text", "image") if kind[0] in category.replace("2", "")],
        eval_splits=[split],
        eval_langs=["eng-Latn"],
        main_score="hit_at_1",
    )
    facts = {"metadata": metadata, "found": dataset, "split": split, "documents": documents}
    return type(metadata.name, (MMEBTask,), facts)()


def _kind(dataset: EvalDataset, ids: np.ndarray, what: str) -> str:
    """`i`, `t` or `it`: what these inputs have.

    Raises:
        CocoaError: some have an image and others none; mteb has no such tasks.
    """
    sides = [dataset.inputs[i] for i in ids.tolist()]
    shown = sum(side.image is not None for side in sides)
    if 0 < shown < len(sides):
        counts = f"{shown} of {len(sides)} {what}"
        raise CocoaError(f"data set {dataset.name}: {counts} have an image; mteb needs all or none")
    return ("i" if shown else "") + ("t" if any(side.prompt() for side in sides) else "")


def _image_cell(path: str) -> dict[str, Any]:
    """A file as it is (an archive's member by its content), or as upright RGB where libraries would differ on it."""
    packed = read_image_bytes(path) if split_archive(path)[0] else None
    with PIL.open(io.BytesIO(packed) if packed else path) as opened:
        if opened.mode == "RGB" and orientation(opened) == 1:
            return {"path": None if packed else path, "bytes": packed}
    content = io.BytesIO()
    load_image(path).save(content, "PNG")
    return {"path": None, "bytes": content.getvalue()}


class CocoaEncoder(AbsEncoder):
    """A checkpoint of ours (or a model of sentence-transformers) as mteb asks it.

    Inputs are rendered and batched as in `cocoa evaluate`. A task's own prompt, if it has one, is the instruction of
    its queries (or of the side that it names).

    Args:
        name: mteb's name of the model.
        revision: not used.
        device: not used; the accelerator if there is one.
        path: checkpoint folder or hub id; by default the name.
    """

    def __init__(self, name: str, revision: str | None = None, device: str | None = None, path: str = "") -> None:
        self.embedder = load_embedder(path or name)
        self.model = self.embedder.model

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        batch_size: int = 8,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embeddings (inputs, D) of a data loader's batches; see mteb's `EncoderProtocol`."""
        instruction = _instruction(task_metadata.prompt, prompt_type)
        rows = []
        for batch in inputs:
            count = len(batch["image"] if "image" in batch else batch["text"])
            texts, images = batch.get("text", [""] * count), batch.get("image", [None] * count)
            sides = [Side(instruction, text, image) for text, image in zip(texts, images, strict=True)]
            rows.append(self.embedder.embed(sides, batch_size).numpy())
        return np.concatenate(rows)


def _instruction(prompt: Any, prompt_type: Any) -> str:
    """What a task tells the model to do with one side of it."""
    side = str(getattr(prompt_type, "value", prompt_type))
    if isinstance(prompt, dict):
        return prompt.get(side, "")
    return prompt or "" if side != "document" else ""


def model_meta(checkpoint: str | Path) -> ModelMeta:
    """What mteb wants to know of a checkpoint folder, and how it is loaded.

    Raises:
        CocoaError: no such folder.
    """
    folder = Path(locate(str(checkpoint)))
    if not folder.is_dir():
        raise CocoaError(f"model {checkpoint}: no such folder; download the checkpoint first")
    record = read_record(folder)
    trained_on = {task_name(name) for name in record.get("rows", {})}
    parameters = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            parameters += sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118
    return ModelMeta(
        loader=CocoaEncoder,  # type: ignore[arg-type]
        loader_kwargs={"path": str(folder)},
        name=f"cocoa/{short_name(folder).replace('/', '-')}",
        revision=hash_folder(folder),
        release_date=None,
        languages=["eng-Latn"],
        n_parameters=parameters,
        memory_usage_mb=None,
        max_tokens=trained_length(record),
        embed_dim=AutoConfig.from_pretrained(folder).get_text_config().hidden_size,
        license=None,
        open_weights=True,
        public_training_code=None,
        public_training_data=None,
        framework=["Sentence Transformers", "PyTorch", "Transformers"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=True,
        training_datasets=trained_on or None,
        modalities=["text", "image"],
        adapted_from=record.get("source"),
    )
