/* What a callback may call, in which thread it runs, and when a source is released. */
#include "test.h"
#include <poll.h>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, BYTES = 2 * PAGE };

struct source {
    ps_server *server;
    ps_region *region, *built;
    int fd, calls, errno_of_read, released;
};

/* Of calls that come at once. */
static pthread_mutex_t counts = PTHREAD_MUTEX_INITIALIZER;

/* A source that asks for all that a callback may ask for. */
static int read_and_ask(void *ctx, uint64_t offset, void *into, size_t count) {
    struct source *source = (struct source *)ctx;
    uint64_t faults;
    size_t bytes;
    if (source->fd >= 0) {
        CHECK(ps_server_fd(source->server) == source->fd);
        FAILS(ps_server_serve(source->server, 1, NULL), PS_IN_USE, "callback");
    }
    if (source->region) {
        CHECK(ps_region_bytes(source->region) == BYTES && ps_region_data(source->region));
        OK(ps_region_metric(source->region, "faults", &faults));
        OK(ps_region_plan(source->region, NULL, 0, &bytes));
        FAILS(ps_region_free(source->region), PS_IN_USE, "callback");
    }
    ps_builder *builder;
    OK(ps_builder_new(&builder));
    OK(ps_add_hole(builder, 1));
    CHECK(!pthread_mutex_lock(&counts));
    source->calls++;
    if (!source->built)
        OK(ps_builder_build(builder, source->server, &source->built));
    CHECK(!pthread_mutex_unlock(&counts));
    OK(ps_builder_free(builder));
    FAILS(ps_server_free(source->server), PS_IN_USE, "callback");
    for (size_t i = 0; i < count; i++)
        ((char *)into)[i] = (char)((offset + i) / PAGE + 1);
    return source->errno_of_read;
}

static void release(void *ctx) { ((struct source *)ctx)->released++; }

static ps_source source_of(struct source *state) {
    ps_source source;
    memset(&source, 0, sizeof source);
    source.size = sizeof source;
    source.ctx = state;
    source.bytes = BYTES;
    source.read_at = read_and_ask;
    source.release = release;
    return source;
}

static void *touch(void *region) {
    const char *base = (const char *)ps_region_data((const ps_region *)region);
    CHECK(base[0] == 1 && base[BYTES - 1] == 2);
    return NULL;
}

static ps_region *region_of(ps_server *server, struct source *state) {
    ps_source source = source_of(state);
    ps_builder *builder;
    OK(ps_builder_new(&builder));
    OK(ps_add_source(builder, &source));
    OK(ps_builder_build(builder, server, &state->region));
    OK(ps_builder_free(builder));
    return state->region;
}

/* The callbacks of a manual server run in its loop, below ps_server_serve(). */
static void in_a_loop(void) {
    struct source state = { NULL, NULL, NULL, -1, 0, 0, 0 };
    pthread_t thread;
    OK(ps_server_manual(&state.server));
    state.fd = ps_server_fd(state.server);
    ps_region *region = region_of(state.server, &state);
    CHECK(!pthread_create(&thread, NULL, touch, region));
    while (state.calls < 2) {
        struct pollfd ready = { state.fd, POLLIN, 0 };
        CHECK(poll(&ready, 1, -1) == 1);
        OK(ps_server_serve(state.server, 100, NULL));
    }
    CHECK(!pthread_join(thread, NULL));
    OK(ps_region_free(state.built));
    OK(ps_region_free(region));
    OK(ps_server_free(state.server));
    CHECK(state.released == 1);
}

/* Those of a pool run in its threads. */
static void in_a_pool(ps_server *server) {
    struct source state = { server, NULL, NULL, -1, 0, 0, 0 };
    ps_region *region = region_of(server, &state);
    touch(region);
    CHECK(state.calls > 0 && state.released == 0);
    CHECK(!*(const char *)ps_region_data(state.built));
    OK(ps_region_free(state.built));
    OK(ps_region_free(region));
    CHECK(state.released == 1);
}

struct told {
    pthread_t thread;
    uint64_t offset;
    int calls;
};

static void tell(void *ctx, uint64_t offset, const char *reason) {
    struct told *told = (struct told *)ctx;
    told->thread = pthread_self(), told->offset = offset, told->calls++;
    CHECK(*reason);
}

/* A failure is told in the thread that has tried to fill the page. */
static void a_failure_in_the_calling_thread(ps_server *server) {
    struct source state = { server, NULL, NULL, -1, 0, 5, 0 };
    struct told told = { 0, 0, 0 };
    ps_source source = source_of(&state);
    ps_builder *builder;
    ps_region *region;
    OK(ps_builder_new(&builder));
    OK(ps_builder_on_page_failure(builder, tell, &told));
    OK(ps_add_source(builder, &source));
    OK(ps_builder_build(builder, server, &region));
    OK(ps_builder_free(builder));
    FAILS(ps_region_populate(region, PAGE, 1), PS_SOURCE_FAILED, "os error 5");
    CHECK(ps_last_errno() == 5 && told.calls == 1 && told.offset == PAGE);
    CHECK(pthread_equal(told.thread, pthread_self()));
    OK(ps_region_free(state.built));
    OK(ps_region_free(region));
}

/* A source is released once, also if the call fails, and not by a forked child. */
static void releases(ps_server *server) {
    struct source state = { server, NULL, NULL, -1, 0, 0, 0 };
    ps_source source = source_of(&state);
    FAILS(ps_add_source(NULL, &source), PS_INVALID_ARGUMENT, "builder");
    CHECK(state.released == 1);
    source.read_at = NULL;
    FAILS(ps_add_source(NULL, &source), PS_INVALID_ARGUMENT, "read_at");
    CHECK(state.released == 1);
    state.released = 0;
    ps_region *region = region_of(server, &state);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        OK(ps_region_free(region));
        _exit(state.released);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(state.released == 0);
    OK(ps_region_free(region));
    CHECK(state.released == 1);
}

int main(void) {
    ps_server *server;
    OK(ps_server_pool(NULL, &server));
    in_a_loop();
    in_a_pool(server);
    a_failure_in_the_calling_thread(server);
    releases(server);
    OK(ps_server_free(server));
    return 0;
}
