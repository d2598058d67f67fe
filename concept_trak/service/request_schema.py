"""What a request may hold: the words of a question, and those settings that need no other model,
rows or pictures. Bounds, choices and help are those of `settings`; some are narrower here, since
others wait.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, create_model

from ..attribution import prompts
from ..errors import UserError
from ..parsing import Option
from ..settings import Settings, flat_fields

REQUEST_FIELDS = (
    *("negative_prompt", "query_form", "scope", "seed", "gen_guidance_scale"),
    *("gen_num_inference_steps", "concept_guidance_scale", "eta", "epochs", "damping", "top_k"),
)
FIELD_LIMITS = {"gen_num_inference_steps": 250, "epochs": 64, "top_k": 100}
PROMPT_LETTERS, CONCEPT_LETTERS, CONCEPTS = 1000, 200, 8
GUIDANCE = ("gen_guidance_scale", "concept_guidance_scale")
MOST_GUIDANCE = 1000.0  # in size: beyond, samples are not finite
TYPES: dict[str, type] = {"int": int, "float": float, "str": str}

Prompt = Annotated[str, StringConstraints(max_length=PROMPT_LETTERS)]
Concept = Annotated[str, StringConstraints(min_length=1, max_length=CONCEPT_LETTERS)]


class QueryRequest(BaseModel):
    """A question: the prompt, and concepts that stand in it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Prompt = Field(description="what to generate and ask about")
    concepts: list[Concept] = Field(
        description="words of the prompt", min_length=1, max_length=CONCEPTS
    )
    negative_prompts: list[Prompt] | None = Field(
        None, description="c- of each concept, in order; left out: by query_form"
    )
    thumbnails: Literal["links", "data", "none"] = Field(
        "links", description="training pictures as addresses, or inside the answer as data URLs"
    )


def make_request_model(base: Settings) -> type[BaseModel]:
    """`QueryRequest` with the settings ASKABLE, each as in `settings` and by default as in
    `base`."""
    fields: dict[str, Any] = {}
    for field in flat_fields():
        if field.name in REQUEST_FIELDS:
            option: Option = field.metadata["option"]
            kind: Any = TYPES[str(field.type)]
            if choices := option.allowed():
                kind = Literal[choices]
            limits: dict[str, Any] = {
                "ge": option.low,
                "le": FIELD_LIMITS.get(field.name, option.high),
            }
            if field.name in GUIDANCE:
                limits = {"ge": -MOST_GUIDANCE, "le": MOST_GUIDANCE}
            if kind is str:
                limits = {"max_length": PROMPT_LETTERS}
            if kind is float:
                limits["allow_inf_nan"] = False
            told = f"{option.help} ({option.unit})" if option.unit else option.help
            told += f"; left out: {getattr(base, field.name)!r}"
            known = {k: v for k, v in limits.items() if v is not None}
            fields[field.name] = (kind | None, Field(None, description=told, **known))
    made = create_model("Question", __base__=QueryRequest, **fields)
    made.__doc__ = QueryRequest.__doc__
    return made


def settings_of(asked: BaseModel, base: Settings) -> Settings:
    """The settings of a question over those of the service.

    UserError for a value that no setting may have, and for concepts that cannot be told apart.
    """
    given = {k: v for k, v in asked.model_dump().items() if v is not None}
    concepts: list[str] = given.pop("concepts")
    given.pop("thumbnails", None)
    text = "|".join(concepts)
    if prompts.split_list(text) != [concept.strip() for concept in concepts]:
        raise UserError(
            "a concept may hold no '|', nor ',' where it is the only one; give concepts without"
        )
    given |= {"target_concepts": text}
    if "negative_prompts" in given:
        given["negative_prompts"] = _joined(given["negative_prompts"], len(concepts))
    settings = base.but(**given)
    for field in flat_fields():
        if field.name in given:
            field.metadata["option"].check(field.name, getattr(settings, field.name))
    return settings


def _joined(negatives: list[str], count: int) -> str:
    """NEGATIVE_PROMPTS of a list. UserError unless there is one for each concept, in words that can
    be told apart.
    """
    if len(negatives) != count or not any(text.strip() for text in negatives):
        raise UserError(
            f"negative_prompts has {len(negatives)} items for {count} concepts; give "
            "negative_prompts one for each, not all empty, or leave it out"
        )
    if count > 1 and any("|" in text for text in negatives):
        raise UserError(
            "a negative prompt may hold no '|' where there are several; give "
            "negative_prompts without"
        )
    return "|".join(negatives) if count > 1 else negatives[0]


@functools.cache
def service_defaults() -> dict[str, Any]:
    """The defaults of the stage `service`, under which every answer is recorded: where it was asked
    is no part of it.
    """
    return vars(Settings().service)
