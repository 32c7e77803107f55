// Loaded before anything else of the function's process; makes a clone of the snapshot unique before its handler runs.
//
// The snapshot is taken while the Lambda client's native part waits in next(). What the first one brings is handed on only
// when the generators that live in this process were renewed; without that, the process ends and the handler does not run.
'use strict';

const Module = require('module');
const crypto = require('crypto');
const { RTLD_DEEPBIND, RTLD_NOW } = require('os').constants.dlopen;
const reseed = require('/var/runtime/thaw_identity.node');

const CLIENT = /^\/var\/runtime\/node_modules\/aws-lambda-ric\/.*rapid-client\.node$/;
// Node's own caches (lib/internal/crypto/random.js): 128 UUIDs, and 6 KiB from which each integer takes 6 bytes.
const UUIDS_CACHED = 128;
const INTEGERS_CACHED = 1024;

const { randomFillSync, randomInt, randomUUID } = crypto;
let integersUsed = false;

// V8's generator cannot be seeded anew. This one draws from OpenSSL's, 512 numbers at a time: 53 random bits each.
const words = new Uint32Array(1024);
let wordsLeft = 0;
Math.random = {
    random() {
        if (wordsLeft === 0) {
            randomFillSync(words);
            wordsLeft = words.length;
        }
        wordsLeft -= 2;
        return ((words[wordsLeft] >>> 5) * 0x4000000 + (words[wordsLeft + 1] >>> 6)) / 0x20000000000000;
    },
}.random;

// Who never drew integers need not have their cache emptied. UUIDs' is drawn from past this object, too (Web Crypto).
crypto.randomInt = function (...range) {
    integersUsed = true;
    return randomInt(...range);
};
Object.defineProperty(crypto.randomInt, 'name', { value: randomInt.name });
Object.defineProperty(crypto.randomInt, 'length', { value: randomInt.length });
Module.syncBuiltinESMExports();

function renew() {
    reseed();
    wordsLeft = 0;
    // Each is emptied by as many draws as it holds: on the way it is filled from the reseeded generator.
    for (let left = UUIDS_CACHED; left > 0; left -= 1) randomUUID();
    for (let left = integersUsed ? INTEGERS_CACHED : 0; left > 0; left -= 1) randomInt(2);
}

function unique(client) {
    const { next } = client;
    client.next = () => {
        client.next = next;
        renew(); // once before the snapshot, so that its code is in memory
        return next().then((request) => {
            try {
                renew();
            } catch (error) {
                console.error('the random generators of this clone cannot be renewed:', error);
                process.exit(1);
            }
            return request;
        });
    };
}

// The client's other way to get requests would go past this one.
delete process.env.AWS_LAMBDA_NODEJS_USE_ALTERNATIVE_CLIENT_1;

const loadNative = Module._extensions['.node'];
Module._extensions['.node'] = function (module, filename) {
    if (!CLIENT.test(filename)) return loadNative(module, filename);
    Module._extensions['.node'] = loadNative;
    // A Node.js that brings its own OpenSSL exports it under the names that the client's libcurl looks for in the distribution's.
    process.dlopen(module, filename, RTLD_NOW | RTLD_DEEPBIND);
    unique(module.exports);
};
