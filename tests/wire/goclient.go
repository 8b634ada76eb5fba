// The database's side of the wire, as its server is written: net/http over a Unix dialer, one call after another
// over one connection, then eight callers at once. It knows the table of routes and nothing else. The last line of
// its output is `done`.
package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

var client http.Client
var dials atomic.Int64

func call(method, path string, body any) (int, map[string]any) {
	var reader io.Reader
	if body != nil {
		raw, err := json.Marshal(body)
		must(err == nil, err)
		reader = bytes.NewReader(raw)
	}
	request, err := http.NewRequest(method, "http://unix"+path, reader)
	must(err == nil, err)
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	response, err := client.Do(request)
	must(err == nil, err)
	defer response.Body.Close()
	raw, err := io.ReadAll(response.Body)
	must(err == nil, err)
	answer := map[string]any{}
	if strings.HasPrefix(response.Header.Get("Content-Type"), "application/json") && response.StatusCode == 200 {
		must(json.Unmarshal(raw, &answer) == nil, string(raw))
	} else {
		answer["text"] = string(raw)
	}
	return response.StatusCode, answer
}

func must(right bool, what any) {
	if !right {
		fmt.Println("failed:", what)
		os.Exit(1)
	}
}

type object map[string]any

func message(keyID any, text []byte) {
	status, sealed := call("POST", "/encrypt", object{"key_id": keyID, "plaintext": text})
	must(status == 200, sealed)
	status, opened := call("POST", "/decrypt", object{"key_id": keyID, "ciphertext": sealed["ciphertext"]})
	must(status == 200, opened)
	must(opened["plaintext"] == base64.StdEncoding.EncodeToString(text), "another plaintext")
}

func main() {
	dialer := net.Dialer{}
	client.Transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			dials.Add(1)
			return dialer.DialContext(ctx, "unix", os.Args[1])
		},
		MaxIdleConnsPerHost: 8,
	}
	client.Timeout = 20 * time.Second

	for _, path := range []string{"/healthz", "/health"} {
		status, answer := call("GET", path, nil)
		must(status == 200 && answer["text"] == "ok", path)
	}
	status, made := call("POST", "/create_dek_for_thread", object{"thread_id": "go-1"})
	must(status == 200, made)
	for _, name := range []string{"key_id", "wrapped", "kek_id", "kek_version"} {
		value, isText := made[name].(string)
		must(isText && value != "", name)
	}
	status, wrapped := call("GET", "/get_wrapped?key_id="+made["key_id"].(string), nil)
	must(status == 200 && wrapped["wrapped"] == made["wrapped"], wrapped)
	message(made["key_id"], []byte("héllo"))
	message(made["key_id"], []byte{})
	message(made["key_id"], bytes.Repeat([]byte("0123456789abcdef"), 40_000))

	_, other := call("POST", "/create_dek_for_thread", object{"thread_id": "go-2"})
	_, sealed := call("POST", "/encrypt", object{"key_id": made["key_id"], "plaintext": []byte("x")})
	status, answer := call("POST", "/decrypt", object{"key_id": other["key_id"], "ciphertext": sealed["ciphertext"]})
	must(status == 422, answer)
	status, answer = call("GET", "/get_wrapped?key_id=nosuchkey", nil)
	must(status == 404, answer)

	// A body of a length that is not known beforehand goes out in chunks.
	body, writer := io.Pipe()
	go func() { fmt.Fprintf(writer, `{"thread_id":"go-3"}`); writer.Close() }()
	request, err := http.NewRequest("POST", "http://unix/create_dek_for_thread", body)
	must(err == nil, err)
	request.Header.Set("Content-Type", "application/json")
	reused := false
	trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) { reused = info.Reused }}
	response, err := client.Do(request.WithContext(httptrace.WithClientTrace(request.Context(), trace)))
	must(err == nil && response.StatusCode == 200 && reused, err)
	_, err = io.Copy(io.Discard, response.Body)
	must(err == nil && response.Body.Close() == nil, err)
	must(dials.Load() == 1, "the connection was not kept")

	status, moved := call("POST", "/rotate_kek", object{"new_kek_hex": os.Args[2]})
	must(status == 200 && moved["status"] == "ok" && moved["rewrapped"] == 3.0, moved)
	status, opened := call("POST", "/decrypt", object{"key_id": made["key_id"], "ciphertext": sealed["ciphertext"]})
	must(status == 200 && opened["plaintext"] == "eA==", opened)
	status, rewrapped := call("POST", "/rewrap", object{"key_id": made["key_id"], "new_kek_hex": os.Args[3]})
	must(status == 200 && rewrapped["kek_id"] != moved["kek_id"], rewrapped)

	var callers sync.WaitGroup
	for caller := 0; caller < 8; caller++ {
		callers.Add(1)
		go func(keyID any) {
			defer callers.Done()
			for number := 0; number < 50; number++ {
				message(keyID, []byte(fmt.Sprint("message ", number)))
			}
		}([]any{made["key_id"], other["key_id"]}[caller%2])
	}
	callers.Wait()
	must(dials.Load() <= 16, dials.Load()) // for 800 requests
	fmt.Println("done")
}
