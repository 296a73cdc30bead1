"""Models on the Hugging Face Hub (extra ``hub``), as the Hub's own models are used.

    model = HubModel.from_pretrained("owner/name")        # or a folder
    HubModel.of(model).save_pretrained("folder")
    HubModel.of(model).push_to_hub("owner/name")

A repository holds ``model.safetensors``, the checkpoint of `casm_fast.save`, which says by itself
what the model is; ``config.json``, the same description for the Hub's pages; and a model card.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    from huggingface_hub import ModelHubMixin, hf_hub_download
except ImportError as error:
    raise ImportError(
        "casm_fast.models.hub: expected huggingface_hub, but it is not installed: "
        "pip install 'casm_fast[hub]'"
    ) from error

from casm_fast.models import checkpoint
from casm_fast.models.saliency import SaliencyModel


class HubModel(
    SaliencyModel,
    ModelHubMixin,
    library_name="casm_fast",
    license="bsd-3-clause",
    pipeline_tag="image-segmentation",
    tags=["saliency", "weakly-supervised-localization"],
):
    """A `SaliencyModel` with ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``."""

    @classmethod
    def of(cls, model: SaliencyModel) -> HubModel:
        """The same model, its modules shared, in the mode that it is in."""
        made = cls(
            model.classifier,
            model.decoder,
            model.separate_encoder,
            classes=model.classes,
            input_size=model.input_size,
            resize_policy=model.resize_policy,
            mean=model.mean,
            std=model.std,
            extra=model.extra,
        )
        made._hub_mixin_config = {"casm_fast": checkpoint.describe(model)}
        made.training = model.training
        return made

    def _save_pretrained(self, save_directory: Path) -> None:
        checkpoint.save(self, Path(save_directory) / checkpoint.FILE_NAME)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        device: str = "cpu",
        config: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> HubModel:
        """A model from a folder or a repository.

        Args:
            model_id: A folder, or "owner/name".
            revision: Branch, tag or commit.
            cache_dir: Where downloads are kept.
            force_download: Whether to fetch what is there already.
            local_files_only: Whether to fetch nothing.
            token: Of the Hub.
            device: Where the model goes.
            config: What config.json says; the checkpoint knows it, too.
            **others: Nothing; the model is what the checkpoint says.

        Returns:
            The model in eval mode.

        Raises:
            FileNotFoundError: The folder holds no model.
            TypeError: There are ``others``.
        """
        del config
        if others:
            raise TypeError(
                "from_pretrained: expected no arguments of the model, which its checkpoint holds, "
                f"got {min(others)}"
            )
        if Path(model_id).is_dir():
            file = Path(model_id)
        else:
            file = Path(
                hf_hub_download(
                    model_id,
                    checkpoint.FILE_NAME,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        return cls.of(checkpoint.load(file, device=device))
