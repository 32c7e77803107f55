"""Answers with a greeting. What stands outside the handler runs once, before the function is frozen."""


def handler(event, context):
    name = event.get("name", "world")
    print(f"greeting {name}")
    return {"greeting": f"Hello, {name}!"}
