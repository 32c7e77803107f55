// Starts the unmodified Lambda client, which finds the function's handler in the environment.
import '/var/runtime/node_modules/aws-lambda-ric/index.mjs';
