// The AWS SDK for JavaScript v3, unmodified, against a running gateway. `node sdk.mjs SCENARIO` ends with 0 if all held.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';

const { SDK_HOME, ENDPOINT, ZIP, ZIP_2, FUNCTION, STREAMING, ROLE } = process.env;
const sdk = createRequire(`${SDK_HOME}/package.json`)('@aws-sdk/client-lambda');
const { LambdaClient } = sdk;

const client = new LambdaClient({
    endpoint: ENDPOINT,
    region: 'us-east-1',
    credentials: { accessKeyId: 'any', secretAccessKey: 'any' },
    maxAttempts: 1,
});
const send = (operation, input) => client.send(new sdk[`${operation}Command`](input));
const text = (bytes) => Buffer.from(bytes ?? []).toString();
const invoke = async (FunctionName, event, more) => {
    const answer = await send('Invoke', { FunctionName, Payload: JSON.stringify(event ?? {}), ...more });
    return { ...answer, told: answer.Payload?.length ? JSON.parse(text(answer.Payload)) : undefined };
};
const until = (waiter, input) => sdk[`waitUntil${waiter}`]({ client, maxWaitTime: 200, minDelay: 0.2, maxDelay: 0.4 }, input);

const scenarios = {
    // Create, wait, read, list, update code and settings, publish, alias, delete.
    async lifecycle() {
        const FunctionName = 'js-lifecycle';
        const created = await send('CreateFunction', {
            FunctionName, Runtime: 'nodejs22.x', Handler: 'index.handler', Role: ROLE, Timeout: 60, MemorySize: 256,
            Code: { ZipFile: readFileSync(ZIP) }, Environment: { Variables: { MINE: 'yes' } },
        });
        assert.equal(created.State, 'Pending');
        const active = await until('FunctionActiveV2', { FunctionName });
        assert.equal(active.state, 'SUCCESS');
        assert.equal((await invoke(FunctionName, { do: 'tell' })).told.mine, 'yes');
        const { Configuration } = await send('GetFunction', { FunctionName });
        assert.deepEqual([Configuration.Runtime, Configuration.State], ['nodejs22.x', 'Active']);
        const names = [];
        for await (const page of sdk.paginateListFunctions({ client }, {})) names.push(...page.Functions.map((f) => f.FunctionName));
        assert(names.includes(FunctionName));

        await send('UpdateFunctionCode', { FunctionName, ZipFile: readFileSync(ZIP_2) });
        await until('FunctionUpdatedV2', { FunctionName });
        assert.equal((await invoke(FunctionName)).told, 'the second');

        const { Version } = await send('PublishVersion', { FunctionName });
        assert.equal(Version, '1');
        await until('PublishedVersionActive', { FunctionName, Qualifier: Version });
        await send('CreateAlias', { FunctionName, Name: 'live', FunctionVersion: Version });
        const answer = await invoke(FunctionName, {}, { Qualifier: 'live' });
        assert.deepEqual([answer.told, answer.ExecutedVersion], ['the second', '1']);
        const { Aliases } = await send('ListAliases', { FunctionName });
        assert.deepEqual(Aliases.map((alias) => alias.Name), ['live']);
        const { Versions } = await send('ListVersionsByFunction', { FunctionName });
        assert.deepEqual(Versions.map((version) => version.Version), ['$LATEST', '1']);

        await send('DeleteFunction', { FunctionName });
        await assert.rejects(send('GetFunction', { FunctionName }), sdk.ResourceNotFoundException);
    },

    async invocations() {
        const plain = await invoke(FUNCTION, { do: 'tell', x: 'ü' }, { LogType: 'Tail' });
        assert.deepEqual([plain.StatusCode, plain.told.event.x, plain.ExecutedVersion], [200, 'ü', '$LATEST']);
        assert.match(Buffer.from(plain.LogResult, 'base64').toString(), /INFO\ttelling[^]*REPORT RequestId/);
        assert.equal((await invoke(FUNCTION, {}, { InvocationType: 'DryRun' })).StatusCode, 204);
        assert.equal((await invoke(FUNCTION, { do: 'tell' }, { InvocationType: 'Event' })).StatusCode, 202);
        const failed = await invoke(FUNCTION, { do: 'fail' });
        assert.deepEqual([failed.FunctionError, failed.told.errorType, failed.told.errorMessage], ['Unhandled', 'RangeError', 'too far']);
    },

    async errors() {
        const missing = await invoke('nobody').catch((error) => error);
        assert(missing instanceof sdk.ResourceNotFoundException);
        assert.deepEqual([missing.name, missing.$metadata.httpStatusCode], ['ResourceNotFoundException', 404]);
        const newer = { FunctionName: 'newer', Runtime: 'nodejs26.x', Handler: 'index.handler', Role: ROLE, Code: { ZipFile: readFileSync(ZIP) } };
        await assert.rejects(send('CreateFunction', newer), (error) => error instanceof sdk.InvalidParameterValueException && /nodejs18\.x/.test(error.message));
    },

    async throttling() {
        await send('PutFunctionConcurrency', { FunctionName: FUNCTION, ReservedConcurrentExecutions: 0 });
        try {
            const refused = await invoke(FUNCTION).catch((error) => error);
            assert(refused instanceof sdk.TooManyRequestsException, String(refused));
            assert.equal(refused.$metadata.httpStatusCode, 429);
        } finally {
            await send('DeleteFunctionConcurrency', { FunctionName: FUNCTION });
        }
        assert.equal((await invoke(FUNCTION, { do: 'tell' })).StatusCode, 200);
    },

    async streaming() {
        const { EventStream } = await send('InvokeWithResponseStream', { FunctionName: STREAMING, Payload: '{}', LogType: 'Tail' });
        const [pieces, times] = [[], []];
        let end;
        for await (const event of EventStream) {
            if (event.PayloadChunk) {
                pieces.push(text(event.PayloadChunk.Payload));
                times.push(performance.now());
            } else end = event.InvokeComplete;
        }
        assert.equal(pieces.join(''), 'one,two,three,four,');
        assert(pieces.length >= 3 && times.at(-1) - times[0] > 300, JSON.stringify([pieces, times]));
        assert.equal(end.ErrorCode, undefined);
        assert(end.LogResult);
    },

    async url() {
        const { FunctionUrl } = await send('CreateFunctionUrlConfig', { FunctionName: FUNCTION, AuthType: 'NONE' });
        const answer = await fetch(`${FunctionUrl}path?do=tell`, { method: 'POST', body: 'body', headers: { 'x-mine': 'yes' } });
        const { event } = await answer.json();
        assert.equal(answer.status, 200);
        assert.deepEqual([event.rawPath.endsWith('/path'), event.requestContext.http.method, event.headers['x-mine']], [true, 'POST', 'yes']);
        await send('DeleteFunctionUrlConfig', { FunctionName: FUNCTION });
    },
};

await scenarios[process.argv[2]]();
console.log(`${process.argv[2]} held`);
