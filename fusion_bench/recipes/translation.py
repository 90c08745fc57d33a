"""From one document of a recipe to a config: ``method`` and ``modelpool`` as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fusion_bench.problems import Place, Problem, Problems, did_you_mean
from fusion_bench.recipes.document import (
    Module,
    Parameters,
    Recipe,
    Reference,
    Slice,
    Source,
    Tokenizer,
    Tokens,
)
from fusion_bench.recipes.levels import (
    Chain,
    Link,
    beginnings,
    chain_of,
    options_of,
    settings,
    without_models,
)
from fusion_bench.recipes.methods import IGNORED, METHODS, Method
from fusion_bench.recipes.names import named_after
from fusion_bench.recipes.near import Suspect
from fusion_bench.recipes.places import BASE, of_stage, places_of

_METHODS = "fusion_bench.method."

Node = dict[str, object]


@dataclass(frozen=True)
class Translated:
    """A recipe as a config.

    Attributes:
        method: the node of the method.
        modelpool: the node of the pool.
        notes: what is surprising.
        filters: each filter with the key where it stands.
        places: keys of the config, and where in the recipe they come from.
        suspects: words that are mistakes unless there are such files.
    """

    method: Node
    modelpool: Node
    notes: tuple[str, ...]
    filters: tuple[tuple[str, str], ...] = ()
    places: Mapping[Place, Place] = field(default_factory=dict)
    suspects: tuple[Suspect, ...] = ()


@dataclass
class Translation:
    """The translation of one document."""

    recipe: Recipe
    pool: Node
    stages: Mapping[str, Translated]
    known: Mapping[str, str] = field(default_factory=dict)
    problems: Problems = field(default_factory=Problems)
    notes: list[str] = field(default_factory=list)
    filters: list[tuple[str, str]] = field(default_factory=list)
    _models: dict[str, object] = field(default_factory=dict)
    _inner: dict[Place, Place] = field(default_factory=dict)

    def whole(self) -> Translated:
        """Return the document as a config.

        Raises:
            FusionBenchError: with all problems.
        """
        recipe = self.recipe
        self.notes += recipe.notes
        self._names = self._named()
        self._check_names()
        parts = [part for module in recipe.modules for part in module.slices[:1]]
        models = [[source.model for source in part.sources] for part in parts]
        alike = all(own == models[0] for own in models)
        stacked = not alike or not all(module.whole for module in recipe.modules)
        method = self._stacked() if stacked else self._merged()
        if recipe.base is not None:
            self._models = {BASE: self._node(recipe.base, BASE), **self._models}
        pool = {**self.pool, "models": self._models}
        if (dtype := recipe.out_dtype or recipe.dtype) is not None:
            pool["policy"] = {"dtype": dtype}
        if recipe.tokenizer is not None:
            self._check_tokens(recipe.tokenizer)
            pool["tokenizer"] = self._tokenizer(recipe.tokenizer)
        if recipe.chat_template is not None:
            pool["chat_template"] = recipe.chat_template
        pool["models"] = self._models
        self.problems.raise_all()
        places = places_of(recipe, self._names, stacked=stacked) | self._inner
        return Translated(method, pool, tuple(self.notes), tuple(self.filters), places)

    @property
    def _method(self) -> Method:
        return METHODS[self.recipe.method]

    def _named(self) -> dict[Reference, str]:
        """Return each model's name in the pool."""
        references = list(dict.fromkeys(self.recipe.references()))
        labels: dict[str, Reference] = {}
        for reference in references:
            label = reference.adapter_name or reference.name
            while label in labels:
                label += "-2"
            labels[label] = reference
        known = {label: own for label in labels if (own := self.known.get(label)) is not None}
        named = {own: label for label, own in known.items()}
        for name, label in named_after([label for label in labels if label not in known]).items():
            while name in named:
                name += "-2"
            named[name] = label
        return {labels[label]: name for name, label in named.items()}

    def _check_names(self) -> None:
        """Refuse parameters that the method does not have."""
        recipe, known = self.recipe, self._method.parameters
        levels: list[Parameters] = [recipe.parameters]
        for module in recipe.modules:
            levels += [module.parameters, *(part.parameters for part in module.slices)]
        sources = [source.parameters for source in recipe.sources()]
        for inner, group in ((False, levels), (True, sources)):
            for name, setting in settings(group):
                if name in IGNORED:
                    continue
                if name not in known:
                    reason = f"{recipe.method} has no such parameter, and mergekit ignores it."
                    near = did_you_mean(name, known) if known else ""
                    self._wrong(setting.place, reason, near or "Remove it.")
                elif inner and not known[name].of_model:
                    where = f"{self._said(setting.place)}: '{name}' holds for all models"
                    self.notes.append(f"{where}; beside one of them it is ignored, as in mergekit.")
                elif known[name].option is None:
                    where = self._said(setting.place)
                    self.notes.append(f"{where}: {recipe.method} drops nothing; it has no effect.")
                else:
                    parts = (own.filter for own in setting.conditions if own.filter is not None)
                    self.filters += ((self._said(setting.place), part) for part in parts)

    def _said(self, place: Place) -> str:
        return Problem(place, "").key

    # One merge of whole models.

    def _merged(self) -> Node:
        """Return the method of a document with whole models, in one module or several."""
        recipe = self.recipe
        wholes = [module.slices[0] for module in recipe.modules]
        listed = [[source.model for source in part.sources] for part in wholes]
        for source in wholes[0].sources:
            if listed[0].count(source.model) > 1:
                self._wrong(source.place, "the same model twice.", "Remove one.")
                return {}
        self._check_models(wholes[0], recipe.base)
        parts = [
            (module, part, self._taking_part(part, recipe.base, whole=True))
            for module, part in zip(recipe.modules, wholes, strict=True)
        ]
        names = [self._names[source.model] for source in parts[0][2]]
        for source in parts[0][2]:
            name = self._names[source.model]
            self._models[name] = self._node(source.model, name)
        chains = self._chains(names, parts)
        return self._method_node(names, chains)

    def _taking_part(
        self, part: Slice, base: Reference | None, *, whole: bool
    ) -> tuple[Source, ...]:
        """Return the sources that are merged: those beside an origin, and else all."""
        role = self._method.base
        if role == "donor":
            return part.sources
        if role == "model":
            if whole and base is not None and all(own.model != base for own in part.sources):
                added = Source(base, None, {}, (*self.recipe.place, "base_model"))
                return (added, *part.sources)
            return part.sources
        return tuple(source for source in part.sources if source.model != base)

    def _check_models(self, part: Slice, base: Reference | None) -> None:
        """Refuse a missing base and a wrong number of models."""
        method, name = self._method, self.recipe.method
        if base is None and method.base in ("origin", "end"):
            self._wrong(
                (*self.recipe.place, "base_model"),
                f"missing; {name} compares the others with it.",
                "Name the model that they were fine-tuned from.",
            )
        count = len(self._taking_part(part, base, whole=True))
        reason = method.wrong_number(name, count)
        if reason is not None and (base is not None or method.base not in ("origin", "end")):
            self._wrong(part.place, reason)

    def _chains(
        self, names: Sequence[str], parts: Sequence[tuple[Module, Slice, Sequence[Source]]]
    ) -> list[Chain]:
        """Return the values of all options that the method's parameters decide."""
        chains = []
        for name, parameter in self._method.parameters.items():
            if parameter.option is None or parameter.option == "axis":
                continue
            models = list(enumerate(names)) if parameter.of_model else [(0, None)]
            for index, model in models:
                links: list[Link] = []
                before = len(self.problems)
                unread = False
                for module, part, sources in parts:
                    own = [sources[index].parameters] if parameter.of_model else []
                    levels = [*own, part.parameters, module.parameters, self.recipe.parameters]
                    unread |= any(name in own and not own[name].conditions for own in levels)
                    with self.problems.collect():
                        links += chain_of(name, levels, parameter, module.name)
                if (
                    not unread
                    and len(self.problems) == before
                    and (not links or links[-1].patterns)
                ):
                    if not parameter.required:
                        default = parameter.default
                        assert default is not None
                        value = parameter.values.get(default, default)  # type: ignore[call-overload]
                        if parameter.complement:
                            value = 1 - float(default)
                        links.append(Link((), value))
                    elif not links:
                        self._missing(name, parts[0][2][index].place if model else None)
                    elif model is None and parts[0][0].name is None:
                        self._open_end(name)
                chains.append(Chain(parameter.option, model, tuple(links)))
        return chains

    def _missing(self, name: str, place: Place | None) -> None:
        method = self.recipe.method
        here = (*self.recipe.place, "parameters", name)
        if place is not None and place[-1:] == ("base_model",):
            self._wrong(
                place,
                f"{method} merges the base like the others, and it has no '{name}'.",
                f"List it among the models, with a '{name}' (0 to leave it out).",
            )
        elif place is not None:
            self._wrong((*place, "parameters", name), f"missing; {method} needs one of each model.")
        else:
            self._wrong(here, f"missing; {method} needs it.")

    def _open_end(self, name: str) -> None:
        """Refuse conditions after which some tensors may have no value."""
        settings = self.recipe.parameters.get(name)
        place = settings.place if settings else (*self.recipe.place, "parameters", name)
        reason = f"tensors that none of the filters fits have no '{name}'."
        self._wrong(place, reason, "Add one for the others at the end: {value: …}.")

    def _method_node(self, names: Sequence[str], chains: Sequence[Chain]) -> Node:
        """Return the node of a method with all of its options."""
        method = self._method
        options, rules = options_of(chains)
        node: Node = {"_target_": _METHODS + method.target, **method.fixed}
        node |= without_models(options, names)
        if "nuslerp_flatten" in method.parameters:
            node["axis"] = self._axis()
        if rules:
            node["where"] = rules
        return node

    def _axis(self) -> int | None:
        """Return what counts as a vector for nuslerp."""
        values = {"nuslerp_flatten": True, "nuslerp_row_wise": False}
        for name in values:
            links: list[Link] = []
            with self.problems.collect():
                parameter = self._method.parameters[name]
                links = list(chain_of(name, [self.recipe.parameters], parameter))
            if links and (links[0].patterns or isinstance(links[0].value, Mapping)):
                place = self.recipe.parameters[name].place
                self._wrong(place, "it is the same for all tensors here.", "Give true or false.")
            elif links:
                values[name] = bool(links[0].value)
        if values["nuslerp_flatten"]:
            return None
        return 0 if values["nuslerp_row_wise"] else -1

    # Slices.

    def _stacked(self) -> Node:
        """Return the method of a document with slices, or with modules of other models."""
        slices = [
            own
            for module in self.recipe.modules
            for part in module.slices
            if (own := self._slice(module, part, part.base or self.recipe.base)) is not None
        ]
        methods = [part["base_method"] for part in slices]
        node: Node = {"_target_": _METHODS + "StackedLayers"}
        if methods and all(own == methods[0] for own in methods):
            node["base_method"] = methods[0]
            slices = [{k: v for k, v in own.items() if k != "base_method"} for own in slices]
        return {**node, "slices": slices}

    def _slice(self, module: Module, part: Slice, base: Reference | None) -> Node | None:
        self._check_models(part, base)
        if not part.sources:
            return None
        role = self._method.base
        compared = role in ("origin", "end") or (role == "optional" and base is not None)
        taking = self._taking_part(part, base, whole=module.whole)
        sources = [*part.sources, *(source for source in taking if source not in part.sources)]
        models: dict[str, object] = {}
        merged: list[str] = []
        for source in sources:
            if source.layers is None and not module.whole:
                return None  # told by the reader
            name = self._names[source.model]
            while name in models:
                name += "-2"
            if source in taking:
                merged.append(name)
            if source in taking or not module.whole:
                models[name] = None if source.layers is None else list(source.layers)
                self._models[name] = self._node(source.model, name)
        node: Node = {"models": models}
        if compared and base is not None:
            if not module.whole and all(source.model != base for source in part.sources):
                reason = f"the base '{base}' is not among the sources."
                self._wrong((*part.place, "sources"), reason, "Add it, with its layers.")
                return None
            node["base"] = BASE if module.whole else self._names[base]
        if module.name is not None:
            node["stack"] = [*beginnings(module.name)]
        # Only its own tensors are in a slice of a module.
        inside = replace(module, name=None)
        node["base_method"] = self._method_node(
            merged, self._chains(merged, [(inside, part, taking)])
        )
        return node

    # Models and tokens.

    def _node(self, reference: Reference, called: str) -> object:
        """Return how the pool names a model, which it calls so."""
        stage = self.stages.get(reference.path) if reference.revision is None else None
        whole: object = reference.name
        if stage is not None:
            below = called if reference.adapter is None else f"_{reference.path.strip('_')}_"
            self._inner |= of_stage(below, stage.places)
            whole = {
                "_target_": "fusion_bench.modelpool.MergedModel",
                "modelpool": stage.modelpool,
                "method": stage.method,
            }
        if reference.adapter is None:
            return whole
        if stage is not None:
            self._models[below] = whole
            whole = below
        return {"path": reference.adapter_name, "base": whole}

    def _tokenizer(self, given: Tokenizer) -> object:
        source = given.source
        named = source if isinstance(source, str) else self._in_pool(source, given.source_place)
        rows = {token: row for token, row in given.tokens.items() if row != Tokens()}
        if not rows and given.pad_to_multiple_of is None:
            return named
        node: Node = {"source": named}
        if rows:
            node["tokens"] = {
                token: self._row(own, (*given.place, "tokens", token, "source"))
                for token, own in rows.items()
            }
        if given.pad_to_multiple_of is not None:
            node["pad_to_multiple_of"] = given.pad_to_multiple_of
        return node

    def _check_tokens(self, given: Tokenizer) -> None:
        """Refuse rows of models that are not merged, nor the base."""
        models = [source.model for source in self.recipe.sources()]
        models += [] if self.recipe.base is None else [self.recipe.base]
        for token, own in given.tokens.items():
            if own.source is not None and own.source not in models:
                place = (*given.place, "tokens", token, "source")
                place += () if own.token is None else ("model",)
                near = did_you_mean(str(own.source), map(str, models))
                self._wrong(place, f"'{own.source}' is not among the models.", near)

    def _row(self, own: Tokens, place: Place) -> Node:
        node: Node = {"force": True} if own.force else {}
        if own.zero:
            node["source"] = {"kind": "zero"}
        elif own.source is not None and own.token is None:
            node["source"] = self._in_pool(own.source, place)
        elif own.source is not None:
            key = "token_id" if isinstance(own.token, int) else "token"
            model = self._in_pool(own.source, place)
            node["source"] = {"kind": "model_token", "model": model, key: own.token}
        return node

    def _in_pool(self, reference: Reference, place: Place) -> str:
        """Return the name of a model in the pool, to which it is added if only tokens need it."""
        name = self._names[reference]
        if name in self._models:
            return name
        if reference == self.recipe.base:
            return BASE
        self._models[f"_{name}_"] = self._node(reference, f"_{name}_")
        self._inner.setdefault(("modelpool", "models", f"_{name}_"), place)
        return f"_{name}_"

    def _wrong(self, place: Place, reason: str, remedy: str = "") -> None:
        self.problems.add([Problem(place, reason, remedy)])
