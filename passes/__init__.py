"""Graph passes of the elmo backend: find, canonicalize, match, plan, rewrite."""

if not __name__.startswith("elmo_compile."):
    raise ImportError(
        "the folder passes/ is the package elmo_compile.passes: "
        "write `from elmo_compile.passes import ...`"
    )
