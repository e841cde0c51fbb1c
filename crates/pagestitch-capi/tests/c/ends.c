/* Bytes and servers that end before their region: a truncated file, a fork, a manual server that is freed early. */
#include "test.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, BYTES = 3 * PAGE };

static char path[500];

/* Runs a part in a child, which ends as the part does. */
static int status_of(void (*part)(void)) {
    const struct rlimit none = { 0, 0 };
    int status;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        /* The sanitizers have handlers of their own. */
        CHECK(!setrlimit(RLIMIT_CORE, &none) && signal(SIGSEGV, SIG_DFL) != SIG_ERR);
        part();
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    return status;
}

/* A region of a whole file, which is truncated then. */
static ps_region *truncated(ps_server *server, int in_place) {
    ps_builder *builder;
    ps_region *region;
    CHECK(!truncate(path, 0) && !truncate(path, BYTES));
    OK(ps_builder_new(&builder));
    OK(in_place ? ps_add_file_in_place(builder, path, 0, PS_TO_END) : ps_add_file(builder, path, 0, PS_TO_END));
    OK(ps_builder_build(builder, server, &region));
    OK(ps_builder_free(builder));
    CHECK(ps_region_bytes(region) == BYTES && !truncate(path, PAGE));
    return region;
}

static void files_of(ps_server *server) {
    char bytes[10];
    ps_region *region = truncated(server, 0);
    OK(ps_region_populate(region, 0, PAGE));
    FAILS(ps_region_populate(region, 0, PS_TO_END), PS_SOURCE_FAILED, path);
    FAILS(ps_region_read(region, 2 * PAGE, bytes, 10), PS_SOURCE_FAILED, path);
    OK(ps_region_free(region));
    region = truncated(server, 1);
    OK(ps_region_populate(region, 0, PAGE));
    FAILS(ps_region_populate(region, 0, PS_TO_END), PS_SOURCE_FAILED, path);
    OK(ps_region_read(region, 0, bytes, 10));
    FAILS(ps_region_read(region, 2 * PAGE, bytes, 10), PS_SOURCE_FAILED, path);
    OK(ps_region_free(region));
}

static void a_truncated_file(void) {
    ps_server *server;
    OK(ps_server_pool(NULL, &server));
    files_of(server);
    OK(ps_server_free(server));
    OK(ps_server_inline(&server));
    files_of(server);
    OK(ps_server_free(server));
    /* A part that starts behind the end is refused, as is one that is longer. */
    ps_builder *builder;
    ps_region *region;
    OK(ps_server_eager(&server));
    OK(ps_builder_new(&builder));
    int status = ps_add_file(builder, path, 2 * PAGE, PS_TO_END);
    CHECK((status ? status : ps_builder_build(builder, server, &region)) == PS_INVALID_CHUNK);
    status = ps_add_file(builder, path, 0, 2 * PAGE);
    CHECK((status ? status : ps_builder_build(builder, server, &region)) == PS_INVALID_CHUNK);
    OK(ps_builder_free(builder));
    OK(ps_server_free(server));
}

static ps_region *shared;
static ps_server *parents;

static void touch(void) { CHECK(*(volatile const char *)ps_region_data(shared) == 'm'); }

/* The handles of a parent in a child, which makes its own. */
static void use_in_a_child(void) {
    static const char bytes[] = "my own";
    ps_piece piece = { bytes, sizeof bytes };
    ps_server *server;
    ps_region *region = NULL;
    char into[5];
    CHECK(ps_region_read(shared, 0, into, 5) < 0 && strstr(ps_last_error(), "forked child"));
    CHECK(ps_region_populate(shared, 0, PS_TO_END) < 0 && strstr(ps_last_error(), "forked child"));
    FAILS(ps_region_prefetch(shared, 0, PS_TO_END), PS_FORKED_CHILD, "parent");
    FAILS(ps_region_of_pieces(parents, &piece, 1, &region), PS_FORKED_CHILD, "parent");
    CHECK(!region);
    OK(ps_server_pool(NULL, &server));
    OK(ps_region_of_pieces(server, &piece, 1, &region));
    CHECK(!strcmp((const char *)ps_region_data(region), "my own"));
    OK(ps_region_free(region));
    OK(ps_server_free(server));
    OK(ps_region_free(shared));
    OK(ps_server_free(parents));
}

static void a_fork(void) {
    static const char bytes[] = "mine";
    ps_piece piece = { bytes, sizeof bytes };
    OK(ps_server_pool(NULL, &parents));
    OK(ps_region_of_pieces(parents, &piece, 1, &shared));
    int status = status_of(touch);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
    CHECK(status_of(use_in_a_child) == 0);
    touch();
    OK(ps_region_free(shared));
    OK(ps_server_free(parents));
}

static void free_a_manual_server_early(void) {
    static const char bytes[] = "mine";
    ps_piece piece = { bytes, sizeof bytes };
    ps_server *server;
    OK(ps_server_manual(&server));
    OK(ps_region_of_pieces(server, &piece, 1, &shared));
    OK(ps_server_free(server));
}

/* A read returns an error, and the region can be freed. */
static void calls_without_a_manual_server(void) {
    char into[4];
    free_a_manual_server_early();
    CHECK(ps_region_read(shared, 0, into, 4) < 0);
    OK(ps_region_free(shared));
}

static void touch_without_a_manual_server(void) {
    free_a_manual_server_early();
    touch();
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    snprintf(path, sizeof path, "%s/pagestitch-ends-XXXXXX", argv[1]);
    int fd = mkstemp(path);
    CHECK(fd >= 0 && !close(fd));
    a_truncated_file();
    a_fork();
    CHECK(status_of(calls_without_a_manual_server) == 0);
    int status = status_of(touch_without_a_manual_server);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
    unlink(path);
    return 0;
}
