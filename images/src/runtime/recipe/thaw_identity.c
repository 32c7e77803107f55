// reseed(): fresh bytes of the kernel's into OpenSSL's primary generator, from which those of all threads then reseed.
// Node offers no way to it. RAND_add is declared here (openssl/rand.h, stable since 1.0) to need no headers for one line.
#include <errno.h>
#include <node_api.h>
#include <string.h>
#include <sys/random.h>

extern void RAND_add(const void *bytes, int length, double entropy);

static napi_value reseed(napi_env env, napi_callback_info info) {
    unsigned char bytes[32];
    (void)info;
    // Requests of up to 256 bytes come whole (getrandom(2)).
    if (getrandom(bytes, sizeof bytes, 0) != (ssize_t)sizeof bytes) {
        napi_throw_error(env, NULL, strerror(errno));
        return NULL;
    }
    RAND_add(bytes, sizeof bytes, sizeof bytes);
    explicit_bzero(bytes, sizeof bytes);
    return NULL;
}

NAPI_MODULE_INIT() {
    napi_value function;
    (void)exports;
    if (napi_create_function(env, "reseed", NAPI_AUTO_LENGTH, reseed, NULL, &function) != napi_ok) {
        napi_throw_error(env, NULL, "cannot make the function reseed");
        return NULL;
    }
    return function;
}
