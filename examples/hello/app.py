"""A first function: greets, and shows the event it was given."""

import platform


def handler(event, context):
    print(f"request {context.aws_request_id} for {context.function_name}")
    name = event.get("name", "world") if isinstance(event, dict) else "world"
    return {
        "greeting": f"Hello, {name}!",
        "event": event,
        "python": platform.python_version(),
    }
