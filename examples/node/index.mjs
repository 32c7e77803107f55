// Runs once, before the snapshot: every request finds it done.
import { hostname } from 'node:os';

const started = new Date().toISOString();

export const handler = async (event) => {
    const name = event.queryStringParameters?.name ?? event.name ?? 'world';
    return { greeting: `Hello, ${name}!`, node: process.version, machine: hostname(), started };
};
