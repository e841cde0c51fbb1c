/* Destructors of a thread's keys and functions of atexit() call the library after its thread-local variables are gone. */
#include "test.h"
#include <pthread.h>
#include <unistd.h>

static pthread_key_t key;
static int destructors;

static void fails(void) {
    CHECK(ps_region_populate(NULL, 0, 1) == PS_INVALID_ARGUMENT);
    CHECK(strlen(ps_last_error()) > 10 && ps_last_errno() == 0);
}

static void at_thread_end(void *region) {
    fails();
    OK(ps_region_free((ps_region *)region));
    destructors++;
}

static void *use(void *server) {
    static const char bytes[] = "bytes";
    ps_piece piece = { bytes, sizeof bytes };
    ps_region *region;
    fails();
    CHECK(strstr(ps_last_error(), "null pointer"));
    OK(ps_region_of_pieces((ps_server *)server, &piece, 1, &region));
    CHECK(*(const char *)ps_region_data(region) == 'b');
    CHECK(!pthread_setspecific(key, region));
    return NULL;
}

/* The last function of exit(), which would turn a lost check into a status of 0. */
static void at_exit(void) {
    fails();
    if (destructors != 1)
        _exit(3);
}

int main(void) {
    ps_server *server;
    pthread_t thread;
    CHECK(!atexit(at_exit) && !pthread_key_create(&key, at_thread_end));
    OK(ps_server_pool(NULL, &server));
    CHECK(!pthread_create(&thread, NULL, use, server));
    CHECK(!pthread_join(thread, NULL));
    OK(ps_server_free(server));
    fails();
    return 0;
}
